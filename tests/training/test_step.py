import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lcr.training.config import default_config
from lcr.training.optimizer import make_optimizer, parameter_groups
from lcr.training.step import Functional, Window, init_state, make_step, parameter_values, select_predictions

from pallas_kernels.tolerances import assert_close
from tests.training.toy import Toy

VOCAB, LENGTH = 11, 16


def make_model():
    return Toy({"d_model": 8, "vocab_size": VOCAB}, rngs=nnx.Rngs(3))


@functools.cache
def functional():
    return Functional(make_model())


@functools.cache
def update(accumulation=1):
    config = default_config().optimizer
    config.warmup_steps, config.learning_rate = 0, 0.03
    optimizer = make_optimizer(config, 100, parameter_groups(functional().variables))
    return optimizer, make_step(functional(), optimizer, accumulation)


def fresh_state(accumulation=1):
    return init_state(parameter_values(make_model()), update(accumulation)[0], functional())


def make_batch(rows=4, counted=3, packed=False):
    rng = np.random.default_rng(0)
    loss_mask = np.zeros((rows, LENGTH), np.bool_)
    loss_mask[:, -counted:] = True
    loss_mask[0, -1] = False
    batch = {"tokens": rng.integers(1, VOCAB, (rows, LENGTH), np.int32), "loss_mask": loss_mask}
    if packed:
        batch["segment_ids"] = np.tile(np.repeat(np.int32([1, 2, 0]), [7, 3, 6]), (rows, 1))
    return batch


def expected_loss(batch, parameters):
    """Token by token, in float64, straight from the definition."""
    model = functional().model(parameters)
    logits = np.asarray(model(jnp.asarray(batch["tokens"]))[0], np.float64)
    losses, right = [], 0
    for row, (tokens, mask) in enumerate(zip(batch["tokens"], batch["loss_mask"], strict=True)):
        ids = batch.get("segment_ids", np.ones_like(batch["tokens"]))[row]
        for t in range(1, LENGTH):
            if mask[t] and ids[t] == ids[t - 1] != 0:
                at = logits[row, t - 1]
                losses.append(np.log(np.exp(at - at.max()).sum()) + at.max() - at[tokens[t]])
                right += at.argmax() == tokens[t]
    return np.sum(losses), right, len(losses)


@pytest.mark.parametrize("counted, packed", [(3, False), (15, False), (15, True)], ids=["answer", "all", "packed"])
def test_the_loss_is_that_of_the_counted_tokens(counted, packed):
    batch = make_batch(counted=counted, packed=packed)
    selected = select_predictions(batch)
    assert (selected["positions"] is None) == (counted == 15 and not packed)
    state = fresh_state()
    loss, right, count = expected_loss(batch, state.parameters)
    window = update()[1](state, selected).window
    np.testing.assert_allclose(window.loss, loss, rtol=1e-5)
    assert (window.correct, window.count, window.steps) == (right, count, 1)


def test_a_row_counts_no_token_across_a_boundary_and_none_of_the_padding():
    selected = select_predictions(make_batch(counted=15, packed=True))
    assert selected["weights"].sum() == 4 * (6 + 2)
    assert selected["positions"][1][selected["weights"][1]].tolist() == [0, 1, 2, 3, 4, 5, 7, 8]


def test_choosing_positions_changes_nothing_but_the_work():
    batch = make_batch()
    few, tokens = select_predictions(batch), batch["tokens"]
    every = dict(few, positions=None, targets=tokens[:, 1:], weights=batch["loss_mask"][:, 1:])
    assert few["positions"].shape == (4, 4)
    _, step = update()
    assert_close(step(fresh_state(), few), step(fresh_state(), every), "float32")


@pytest.mark.parametrize("rows", [4, 5], ids=["even", "padded"])
def test_accumulated_pieces_give_the_update_of_the_whole_batch(rows):
    batch = make_batch(rows=rows)
    batch["loss_mask"][1, :] = False  # pieces of unlike weight
    whole = update()[1](fresh_state(), select_predictions(batch))
    pieces = update(2)[1](fresh_state(2), select_predictions(batch, accumulation=2))
    assert_close(pieces, whole, "float32 gradient")
    assert float(whole.window.grad_norm) > 0.1


def test_repeated_steps_learn_the_batch():
    step, state, batch = update()[1], fresh_state(), select_predictions(make_batch())
    losses = []
    for _ in range(30):
        state = step(state.replace(window=Window.empty({})), batch)
        losses.append(float(state.window.loss))
    assert losses[-1] < 0.5 * losses[0]


def test_each_shape_is_compiled_once_and_the_state_donated():
    step, state = make_step(functional(), update()[0]), fresh_state()
    held = state.parameters["embedding"]
    for _ in range(3):
        state = step(state, select_predictions(make_batch()))
    assert step._cache_size() == 1
    assert held.is_deleted()


def test_a_step_that_is_not_finite_changes_nothing_and_is_remembered():
    step, batch = update()[1], select_predictions(make_batch())
    state = step(fresh_state(), batch)
    good = jax.device_get(state)
    poisoned = state.parameters | {"log_decay": jnp.full(8, jnp.inf)}
    state = step(state.replace(parameters=poisoned), batch)
    assert state.failure.step == 2 and not np.isfinite(state.failure.grad_norm)
    state = step(state.replace(parameters=jax.tree.map(jnp.array, good.parameters)), batch)
    assert_close(state.replace(failure=good.failure), good, "exact")
    assert state.failure.step == 2


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is():
    """sqrt has an infinite slope at 0, where its value is 0."""

    class Edge(Toy):
        def __call__(self, *args, **options):
            logits, states = super().__call__(*args, **options)
            return logits + jnp.sqrt(jnp.abs(self.log_decay[...] * 0)).sum(), states

    model = Edge({"d_model": 8, "vocab_size": VOCAB}, rngs=nnx.Rngs(3))
    optimizer = update()[0]
    state = init_state(parameter_values(model), optimizer, Functional(model))
    before = jax.device_get(state.parameters)
    state = make_step(Functional(model), optimizer)(state, select_predictions(make_batch()))
    assert np.isfinite(state.failure.loss) and not np.isfinite(state.failure.grad_norm)
    assert state.failure.step == 1
    assert_close(state.parameters, before, "exact")


def test_a_model_with_other_variables_than_parameters_is_refused():
    model = make_model()
    model.count = nnx.BatchStat(jnp.zeros(3))
    with pytest.raises(ValueError, match="no nnx.Param: count"):
        Functional(model)
