"""RWKV-4: its sizes, initial values and errors. (Equal to a whole model of transformers: tests/pretrained.)"""


import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx


def test_attention_width():
    mixer = lcr.make_mixer("rwkv4", 32, rngs=nnx.Rngs(0), attention_width=48)
    y, state = jax.eval_shape(mixer, jnp.ones((2, 3, 32)))
    assert y.shape == (2, 3, 32)
    assert {leaf.shape for leaf in state.wkv} == {(2, 48)}
    assert mixer.bonus.shape == (48,)


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_state_bytes(dtype, itemsize):
    """d_model itemsize + 12 attention_width + 8 for each sequence, whatever the capacity."""
    mixer = lcr.make_mixer("rwkv4", 64, rngs=nnx.Rngs(0), attention_width=48, dtype=dtype)
    expected = 3 * (64 * itemsize + 12 * 48 + 8)
    assert lcr.state_bytes(mixer.init_state(3, 10)) == lcr.state_bytes(mixer.init_state(3, 10**6)) == expected


def test_initial_values():
    """Log-log decays from -5 to 3: the slowest channel halves in about 100 tokens, the fastest forgets at once. The
    first channel sees the token before alone, later ones more and more of their own; bonuses are 0.3, and half a step
    below and above."""
    mixer = lcr.make_mixer("rwkv4", 32, rngs=nnx.Rngs(0))
    time_decay = np.asarray(mixer.time_decay[...])
    np.testing.assert_allclose(time_decay[[0, -1]], [-5, 3], rtol=1e-6)
    assert (np.diff(time_decay) > 0).all()
    np.testing.assert_allclose(mixer.bonus[...][:3], np.log(0.3) + np.array([0, 0.5, -0.5]), rtol=1e-6)
    for name, first, middle in (("r", 0, 0.5**0.25), ("k", 0, 0.5**0.5), ("v", 0.15, 0.15 + 0.5**0.5)):
        np.testing.assert_allclose(getattr(mixer, f"time_mix_{name}")[...][jnp.array([0, 16])], [first, middle], rtol=1e-5)


def test_no_weight_decay_on_vectors():
    mixer = nnx.eval_shape(lambda: lcr.make_mixer("rwkv4", 32, rngs=nnx.Rngs(0)))
    for name in ("time_mix_r", "time_mix_k", "time_mix_v", "time_decay", "bonus"):
        assert getattr(mixer, name).get_metadata()["group"] == "no_decay"


@pytest.mark.parametrize("time_decay", [-40.0, 200.0], ids=["keeps all", "keeps nothing"])
def test_extreme_decays_have_finite_gradients(time_decay):
    mixer = lcr.make_mixer("rwkv4", 16, rngs=nnx.Rngs(0))
    mixer.time_decay.set_value(jnp.full((16,), time_decay))
    x = 100 * np.random.default_rng(0).standard_normal((1, 20, 16), np.float32)
    graph, parameters = nnx.split(mixer)
    loss = jax.jit(jax.grad(lambda parameters, x: jnp.sum(nnx.merge(graph, parameters)(x)[0] ** 2)))
    gradients = loss(parameters, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_width": 0}, "attention_width=0: expected a whole number above 0"),
        ({"implementation": "chunk"}, "implementation: unknown value 'chunk'. Did you mean 'chunked'?"),
        ({"dtype": "int32"}, "dtype='int32': expected a float type"),
        ({"num_heads": 2}, "unknown option of mixer 'rwkv4': 'num_heads'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer("rwkv4", 32, rngs=nnx.Rngs(0), **options)
