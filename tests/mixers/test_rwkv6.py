"""RWKV-6: its sizes and its errors. (Equal to a whole model of flash-linear-attention: tests/pretrained.)"""


import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.mixers.rwkv6 import RWKV6Config


@pytest.mark.parametrize(("d_model", "heads"), [(16, 1), (32, 2), (48, 3), (64, 4), (80, 5), (256, 4), (1040, 65)])
def test_default_heads_suit_any_width(d_model, heads):
    mixer = nnx.eval_shape(lambda: RWKV6Config().make(d_model, rngs=nnx.Rngs(0)))
    assert (mixer.num_heads, mixer.key_width, mixer.value_width) == (heads, d_model // heads, d_model // heads)


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_state_bytes(dtype, itemsize):
    """d_model itemsize + 4 key_factor value_factor d_model^2 / H + 8 for each sequence, whatever the capacity."""
    mixer = lcr.make_mixer("rwkv6", 64, rngs=nnx.Rngs(0), num_heads=4, key_factor=0.5, dtype=dtype)
    expected = 3 * (64 * itemsize + 4 * 64**2 // 2 // 4 + 8)
    assert lcr.state_bytes(mixer.init_state(3, 10)) == lcr.state_bytes(mixer.init_state(3, 10**6)) == expected


def test_first_decays():
    """Log-log decays from -6 to -1: the slowest channel halves in about 280 tokens, the fastest in two."""
    mixer = lcr.make_mixer("rwkv6", 32, rngs=nnx.Rngs(0))
    decays = np.asarray(mixer._log_decay(jnp.zeros((1, 1, 32))))[0, 0]
    np.testing.assert_allclose(decays[[0, -1]], [-np.exp(-6), -np.exp(-1)], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, r"key_factor=1.0 with d_model=32 and num_heads=5: .* not 6.4"),
        ({"mix_rank": 0}, "mix_rank=0: expected a whole number above 0"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0: expected a number above 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer("rwkv6", 32, rngs=nnx.Rngs(0), **options)
