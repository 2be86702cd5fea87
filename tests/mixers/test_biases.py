"""Biases, which checkpoints of others may have: padding stays nothing, and the pieces make the whole."""

import jax
import lcr
import numpy as np
import pytest
from flax import nnx
from pallas_kernels.tolerances import assert_close

CASES = {
    "attention": {
        "qkv_bias": True, "out_bias": True, "qk_norm": "offset", "scale": 0.3, "rope_width": 4, "head_dim": 8
    },  # fmt: skip
    "mla": {"bias": True, "q_lora_rank": 8, "rope_interleaved": False},
    "mamba": {"proj_bias": True, "activation": "gelu_tanh"},
    "mamba2": {"proj_bias": True, "conv_bias": False, "activation": "relu"},
    "retnet": {"norm_scale": True},
}


@pytest.mark.parametrize("name", CASES)
def test_padding_and_pieces(name):
    """A call of nine tokens with padding among them is nine calls of one."""
    mixer = lcr.make_mixer(name, 32, rngs=nnx.Rngs(0), **CASES[name])
    graph, parameters = nnx.split(mixer)
    rng = np.random.default_rng(1)
    parameters = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape, np.float32), parameters)  # no bias is 0
    call = jax.jit(lambda x, state, ids: nnx.merge(graph, parameters)(x, state, ids))
    x, state = rng.standard_normal((2, 9, 32), np.float32), mixer.init_state(2, 13)
    after, tokens = state, []
    for t in range(9):
        y, after = call(x[:, t : t + 1], after, None)
        tokens.append(y)

    at = np.array([0, 2, 3, 5, 6, 7, 9, 10, 12])  # the rest is padding
    padded, ids = np.full((2, 13, 32), 5.0, np.float32), np.zeros((2, 13), np.int32)
    padded[:, at], ids[:, at] = x, 1
    y, after_padded = call(padded, state, ids)
    assert_close((np.asarray(y)[:, at], after_padded), (np.concatenate(tokens, axis=1), after), "float32")
    assert not np.delete(np.asarray(y), at, axis=1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_width": 3}, "rope_width=3: expected an even one, at most the head_dim 8"),
        ({"rope_width": 10}, "rope_width=10: expected an even one"),
        ({"rope_width": 4, "positions": "none"}, "rope_width=4 beside positions='none'"),
        ({"qk_norm": "shifted"}, "qk_norm='shifted': expected False, True or 'offset'"),
        ({"scale": 0.0}, "scale=0.0: expected a number above 0"),
    ],
)
def test_attention_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer("attention", 32, rngs=nnx.Rngs(0), head_dim=8, **options)
