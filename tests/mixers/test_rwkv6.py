"""RWKV-6 with its channel mixing: equal to a whole model of flash-linear-attention; its sizes and its errors."""

import pathlib

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.layers.channel_mixing import ChannelMixingConfig
from lcr.mixers.rwkv6 import RWKV6Config
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def layer_norm(x, golden, name):
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
    return x * golden[f"{name}.weight"][None, None] + golden[f"{name}.bias"][None, None]


def time_mixing(golden, prefix):
    """A mixer with the weights (`[out, in]`) of one layer of the golden model."""
    options = {"num_heads": 2, "key_factor": 0.5, "mix_rank": 8, "decay_rank": 12, "norm_eps": 1e-5}
    mixer = RWKV6Config(**options).make(32, rngs=nnx.Rngs(0))
    weights = {
        "shift_mix": golden[f"{prefix}.x_proj.0.mu"],
        "mix": golden[f"{prefix}.x_bias"],
        "mix_down": golden[f"{prefix}.x_proj.0.linear.weight"].T.reshape(32, 5, 8),
        "mix_up": np.moveaxis(golden[f"{prefix}.x_proj.2.weight"].reshape(32, 5, 8), 0, 2),
        "decay_down": golden[f"{prefix}.w_proj.linear.lora.0.weight"].T,
        "decay_up": golden[f"{prefix}.w_proj.linear.lora.2.weight"].T,
        "decay_bias": golden[f"{prefix}.w_proj.linear.lora.2.bias"],
        "bonus": golden[f"{prefix}.bonus"],
        "norm_scale": golden[f"{prefix}.g_norm.weight"],
        "norm_bias": golden[f"{prefix}.g_norm.bias"],
    }
    for name, weight in weights.items():
        getattr(mixer, name).set_value(jnp.asarray(weight))
    for ours, theirs in {"r_proj": "r", "k_proj": "k", "v_proj": "v", "gate_proj": "g"}.items():
        getattr(mixer, ours).kernel.set_value(jnp.asarray(golden[f"{prefix}.{theirs}_proj.linear.weight"].T))
    mixer.out_proj.kernel.set_value(jnp.asarray(golden[f"{prefix}.o_proj.weight"].T))
    return mixer


def channel_mixing(golden, prefix):
    layer = ChannelMixingConfig(d_ff=64).make(32, rngs=nnx.Rngs(0))
    for name in ("key", "receptance"):
        getattr(layer, name).kernel.set_value(jnp.asarray(golden[f"{prefix}.{name}.linear.weight"].T))
        getattr(layer, f"{name}_mix").set_value(jnp.asarray(golden[f"{prefix}.{name}.mu"]))
    layer.value.kernel.set_value(jnp.asarray(golden[f"{prefix}.value.weight"].T))
    return layer


@pytest.mark.parametrize("cuts", [(), (33,)], ids=["whole", "in pieces"])
def test_flash_linear_attention_model(cuts):
    """All of a two-layer model with its channel mixing, in one call and in pieces through the states."""
    golden = dict(np.load(GOLDEN / "rwkv6_model_fla.npz"))

    def in_pieces(layer, x):
        run, state, outputs = jax.jit(layer.__call__), None, []
        for piece in jnp.split(x, cuts, axis=1):
            y, state = run(piece, state)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    x = layer_norm(jnp.asarray(golden["embedded"]), golden, "layers.0.pre_norm")
    for name in ("layers.0", "layers.1"):
        x = x + in_pieces(time_mixing(golden, f"{name}.attn"), layer_norm(x, golden, f"{name}.attn_norm"))
        x = x + in_pieces(channel_mixing(golden, f"{name}.ffn"), layer_norm(x, golden, f"{name}.ffn_norm"))
    logits = layer_norm(x, golden, "norm") @ golden["lm_head"].T
    assert_close(logits, golden["logits"], "float32 oracle")


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
