"""Channel mixing: the formulas of RWKV-4 and RWKV-7, and the laws of a mixer (RWKV-6: tests/mixers/test_rwkv6.py)."""

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.layers.channel_mixing import ChannelMixingConfig
from pallas_kernels.tolerances import assert_close

WIDTH = 16
IDS = np.array([[0, 3, 3, 0, 3, 5, 5, 0, 5], [1, 1, 2, 2, 1, 1, 0, 0, 0]], np.int32)


def build(**options):
    layer = ChannelMixingConfig(**options).make(WIDTH, rngs=nnx.Rngs(0))
    layer.key_mix.set_value(jnp.asarray(np.random.default_rng(1).random(WIDTH, np.float32)))
    return layer


def activations():
    return np.random.default_rng(2).standard_normal((*IDS.shape, WIDTH), np.float32)


@nnx.jit
def run(layer, x, state=None, ids=None):
    return layer(x, state, ids)


@nnx.jit
def gradient(layer, x, ids):
    return jax.grad(lambda x: layer(x, None, ids)[0].sum())(x)


@pytest.mark.parametrize("receptance", [True, False])
def test_formula(receptance):
    """As the papers write it, `time_mix` of RWKV-4 being 1 - mu."""
    layer, x = build(receptance=receptance), activations()
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)

    def mixed(mu):
        time_mix = 1 - np.asarray(mu[...])
        return x * time_mix + before * (1 - time_mix)

    expected = np.maximum(mixed(layer.key_mix) @ layer.key.kernel[...], 0) ** 2 @ layer.value.kernel[...]
    if receptance:
        expected = expected / (1 + np.exp(-(mixed(layer.receptance_mix) @ layer.receptance.kernel[...])))
    assert_close(run(layer, x)[0], expected, "float32")


@pytest.mark.parametrize("receptance", [True, False])
def test_pieces_padding_and_documents(receptance):
    """Any cut gives the whole; a document packed beside others gives what it gives alone; padding gives 0."""
    layer, x = build(receptance=receptance), activations()
    whole, state = jax.device_get(run(layer, x, None, IDS))
    pieces, after = [], layer.init_state(2, 9)
    for start, end in ((0, 1), (1, 5), (5, 9)):
        y, after = run(layer, x[:, start:end], after, IDS[:, start:end])
        pieces.append(y)
    assert_close((np.concatenate(pieces, axis=1), after), (whole, state), "float32")
    for at in ([1, 2, 4], [5, 6, 8]):
        assert_close(run(layer, x[:1, at])[0], whole[:1, at], "float32")
    assert not whole[IDS == 0].any()
    assert not np.asarray(gradient(layer, x, IDS))[IDS == 0].any()


def test_bfloat16():
    x = activations()
    y, state = run(build(dtype=jnp.bfloat16), x, None, IDS)
    assert y.dtype == state.shift.dtype == jnp.bfloat16
    assert_close(y, run(build(), x, None, IDS)[0], "bfloat16")


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_state_bytes(dtype, itemsize):
    state = build(dtype=dtype).init_state(3, 10)
    assert lcr.state_bytes(state) == 3 * (WIDTH * itemsize + 8)


def test_a_bad_width_is_named():
    with pytest.raises(ValueError, match="d_ff=-2: expected a whole number above 0"):
        ChannelMixingConfig(d_ff=-2)
