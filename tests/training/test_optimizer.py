import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.training.config import default_config
from lcr.training.optimizer import make_optimizer, make_schedule, parameter_groups
from lcr.training.step import Functional

from tests.training.toy import Toy


def section(**values):
    optimizer = default_config().optimizer
    optimizer.update(values)
    return optimizer


def test_the_learning_rate_rises_and_falls_as_the_formula_says():
    schedule = make_schedule(section(learning_rate=0.5, warmup_steps=4, final_fraction=0.2), 12)
    rates = [float(schedule(jnp.int32(step))) for step in range(14)]
    cosine = [0.5 * (0.2 + 0.8 * (1 + np.cos(np.pi * k / 8)) / 2) for k in range(8)]
    np.testing.assert_allclose(rates, [0.125, 0.25, 0.375, 0.5, *cosine, 0.1, 0.1], rtol=1e-6)


def test_without_warm_up_the_first_step_has_the_whole_rate():
    schedule = make_schedule(section(learning_rate=0.5, warmup_steps=0), 1)
    assert float(schedule(jnp.int32(0))) == 0.5


def test_norms_gates_and_decays_do_not_decay():
    variables = Functional(nnx.eval_shape(lambda: Toy({"d_model": 8, "vocab_size": 9}, rngs=nnx.Rngs(0)))).variables
    assert parameter_groups(variables) == {
        "embedding": "decay", "log_decay": "no_decay", "mix.bias": "no_decay", "mix.kernel": "decay"
    }  # fmt: skip


@pytest.mark.parametrize("mixer", lcr.MIXERS)
def test_of_each_mixer_what_decays_is_its_matrices(mixer):
    config = lcr.ModelConfig(vocab_size=9, d_model=32, mixers=(mixer, mixer))
    model = nnx.eval_shape(lambda: lcr.make_model(config, rngs=nnx.Rngs(0)))
    variables = Functional(model).variables
    mask = {name: group == "decay" for name, group in parameter_groups(variables).items()}
    # layers are stacked along a first axis: what is left is a matrix (or a convolution's taps by channels)
    axes = {name: variables[name].get_value().ndim - name.startswith("groups.") for name in mask}
    assert {name for name, decays in mask.items() if decays and axes[name] < 2} == set()
    assert not any(decays for name, decays in mask.items() if "norm" in name)
    assert mask["embedding"]
    kernels = {name: decays for name, decays in mask.items() if name.endswith(".kernel")}
    assert kernels and all(kernels.values())


def test_of_mamba_these_do_not_decay():
    config = lcr.ModelConfig(vocab_size=9, d_model=32, mixers=("mamba", "mamba"))
    model = nnx.eval_shape(lambda: lcr.make_model(config, rngs=nnx.Rngs(0)))
    groups = parameter_groups(Functional(model).variables)
    mask = {name: group == "decay" for name, group in groups.items()}
    prefix = "groups.blocks.0."
    assert {name.removeprefix(prefix) for name, decays in mask.items() if not decays} == {
        "final_norm.scale", "mixer_norm.scale", "mlp_norm.scale",
        "mixer.A_log", "mixer.D", "mixer.conv.bias", "mixer.dt_bias", "mixer.dt_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_one_update_is_adamw_by_hand(clip_norm):
    settings = section(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=clip_norm, b1=0.9, b2=0.98)
    parameters = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    optimizer = make_optimizer(settings, 10, {"a": "decay", "b": "no_decay"})
    updates, _ = optimizer.update(grads, optimizer.init(parameters), parameters)
    scale = 0.2 if clip_norm else 1.0  # the gradient's norm is 5
    for name, decays in (("a", 0.5), ("b", 0.0)):
        g, p = np.asarray(grads[name]) * scale, np.asarray(parameters[name])
        expected = -0.1 * (g / (np.abs(g) + 1e-8) + decays * p)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, updates))


def test_gates_of_a_memory_and_biases_of_a_router_are_moved_in_their_own_way():
    """A gate at its own rate, without decay and outside the clipping; a bias by its gradient as it is."""
    settings = section(learning_rate=0.1, gate_learning_rate=0.02, warmup_steps=0, weight_decay=0.5, clip_norm=1.0)
    parameters = {"a": jnp.array([1.0, -1.0]), "gate": jnp.array([3.0]), "bias": jnp.array([0.5])}
    grads = {"a": jnp.array([3.0, 4.0]), "gate": jnp.array([1e6]), "bias": jnp.array([0.25])}
    optimizer = make_optimizer(settings, 10, {"a": "decay", "gate": "memory_gate", "bias": "selection_bias"})
    updates, _ = optimizer.update(grads, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["a"], -0.1 * (np.ones(2) + 0.5 * np.array([1.0, -1.0])), rtol=1e-5)
    np.testing.assert_allclose(updates["gate"], [-0.02], rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [-0.25], rtol=1e-6)


def test_infinis_gates_and_routers_biases_are_in_these_groups():
    options = {"moe": {"balance": "bias"}}
    config = lcr.ModelConfig(
        vocab_size=9, d_model=32, mixers=("infini",), feed_forward="moe", feed_forward_options=options
    )
    variables = Functional(nnx.eval_shape(lambda: lcr.make_model(config, rngs=nnx.Rngs(0)))).variables
    groups = parameter_groups(variables)
    assert [name for name, group in groups.items() if group == "memory_gate"] == ["groups.blocks.0.mixer.beta"]
    assert [name for name, group in groups.items() if group == "selection_bias"] == [
        "groups.blocks.0.mlp.selection_bias"
    ]
