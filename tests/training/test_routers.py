"""What training does with the routers of a mixture of experts: their losses, their biases, their rows of metrics."""

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import optax
import pytest
from flax import nnx
from lcr.training.metrics import read_rows
from lcr.training.optimizer import make_optimizer, parameter_groups
from lcr.training.step import Functional, init_state, make_step, parameter_values, select_predictions
from lcr.training.trainer import train

from pallas_kernels.tolerances import assert_close
from tests.training.toy import toy_config

VOCAB, LENGTH, EXPERTS = 11, 8, 4
BIAS = "groups.blocks.0.mlp.selection_bias"


def make_model(**options):
    config = {
        "vocab_size": VOCAB, "d_model": 8, "mixers": ("rglru",), "feed_forward": "moe",
        "feed_forward_options": {"moe": {"num_experts": EXPERTS, "top_k": 2, "d_expert": 4} | options},
    }  # fmt: skip
    return lcr.make_model(config, rngs=nnx.Rngs(0))


def batch(accumulation):
    random = np.random.default_rng(0)
    tokens = random.integers(1, VOCAB, (4, LENGTH), np.int32)
    return select_predictions({"tokens": tokens, "loss_mask": np.ones((4, LENGTH), np.bool_)}, accumulation), tokens


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_routers_losses_are_trained(accumulation):
    """Where pieces are accumulated, the mean of theirs."""
    functional = Functional(make_model(balance="loss", balance_weight=5.0, z_weight=0.5))
    selected, tokens = batch(accumulation)
    tokens = jnp.asarray(tokens)

    def loss(parameters):
        logits, _, _ = functional.apply(parameters, tokens, None, None)
        right = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        pieces = jnp.split(tokens, accumulation)
        of_routers = sum(functional.apply(parameters, piece, None, None)[1] for piece in pieces) / accumulation
        return -right.mean() + of_routers, of_routers

    parameters = parameter_values(make_model(balance="loss", balance_weight=5.0, z_weight=0.5))
    (_, of_routers), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    assert of_routers > 1
    state = init_state(jax.tree.map(jnp.copy, parameters), optax.sgd(1.0), functional)
    after = make_step(functional, optax.sgd(1.0), accumulation)(state, selected)
    found = jax.tree.map(jnp.subtract, parameters, after.parameters)
    assert_close(found, expected, "float32 gradient")


def test_a_bias_sinks_where_the_load_is_above_the_mean_and_rises_where_it_is_below():
    model = make_model(balance="bias", bias_rate=0.01)
    functional = Functional(model)
    settings = toy_config().optimizer
    optimizer = make_optimizer(settings, 10, parameter_groups(functional.variables))
    state = init_state(parameter_values(model), optimizer, functional)
    after = make_step(functional, optimizer)(state, batch(1)[0])
    load = np.asarray(after.window.routing["load"])
    assert load.shape == (1, EXPERTS) and abs(load.sum() - 1) < 1e-6 and load.max() > 1 / EXPERTS
    expected = -0.01 * np.sign(load - 1 / EXPERTS)
    np.testing.assert_allclose(after.parameters[BIAS], expected, atol=1e-7)


def test_rows_of_metrics_hold_loads_and_entropy(tmp_path):
    config = toy_config(**{"model.mixers": ("rglru", "rglru"), "model.feed_forward": "moe", "training.steps": 4})
    with config.unlocked():
        config.model.feed_forward_options = {"moe": {"num_experts": EXPERTS, "top_k": 2, "d_expert": 4}}
    train(config, tmp_path, progress=False)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row]
    assert rows
    for row in rows:
        load = np.asarray(row["expert_load"])
        assert load.shape == (2, EXPERTS)
        np.testing.assert_allclose(load.sum(axis=1), 1, rtol=1e-5)
        assert 0 < row["routing_entropy"] <= np.log(EXPERTS) + 1e-6
