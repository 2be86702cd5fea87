"""Gated linear attention: equal to a whole model of flash-linear-attention, its sizes and its errors."""

import pathlib

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.mixers.gla import GLAConfig
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale[None, None]


def with_weights(golden, prefix):
    """A mixer with the weights (`[out, in]`) of one layer of the golden model."""
    mixer = GLAConfig(num_heads=2, norm_eps=1e-6).make(64, rngs=nnx.Rngs(0))
    for ours, theirs in {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": "g", "out_proj": "o"}.items():
        getattr(mixer, ours).kernel.set_value(jnp.asarray(golden[f"{prefix}.{theirs}_proj"].T))
    mixer.decay_down.set_value(jnp.asarray(golden[f"{prefix}.gk_proj.0"].T))
    mixer.decay_up.set_value(jnp.asarray(golden[f"{prefix}.gk_proj.1"].T))
    mixer.decay_bias.set_value(jnp.asarray(golden[f"{prefix}.gk_proj.1.bias"]))
    mixer.norm.scale.set_value(jnp.asarray(golden[f"{prefix}.g_norm_swish_gate"]))
    return mixer


@pytest.mark.parametrize("cuts", [(), (33,)], ids=["whole", "in pieces"])
def test_flash_linear_attention_model(cuts):
    """All of a two-layer model, in one call and in pieces through the states."""
    golden = dict(np.load(GOLDEN / "gla_model_fla.npz"))
    x = jnp.asarray(golden["embedded"])
    for layer in ("layers.0", "layers.1"):
        run, state, outputs = jax.jit(with_weights(golden, f"{layer}.attn").__call__), None, []
        for piece in jnp.split(rms_norm(x, golden[f"{layer}.attn_norm"]), cuts, axis=1):
            y, state = run(piece, state)
            outputs.append(y)
        x = x + jnp.concatenate(outputs, axis=1)
        h = rms_norm(x, golden[f"{layer}.mlp_norm"])
        h = nnx.silu(h @ golden[f"{layer}.mlp.gate_proj"].T) * (h @ golden[f"{layer}.mlp.up_proj"].T)
        x = x + h @ golden[f"{layer}.mlp.down_proj"].T
    logits = rms_norm(x, golden["norm"]) @ golden["lm_head"].T
    assert_close(logits, golden["logits"], "float32 oracle")


@pytest.mark.parametrize(("d_model", "heads"), [(16, 1), (32, 2), (48, 3), (64, 4), (80, 5), (256, 4), (1040, 65)])
def test_default_sizes_suit_any_width(d_model, heads):
    mixer = nnx.eval_shape(lambda: GLAConfig().make(d_model, rngs=nnx.Rngs(0)))
    assert (mixer.num_heads, mixer.key_width, mixer.value_width) == (heads, d_model // (2 * heads), d_model // heads)


def test_state_bytes():
    """4 key_factor value_factor d_model^2 / H + 8 for each sequence, whatever the capacity."""
    mixer = GLAConfig(num_heads=4, key_factor=0.25, value_factor=2.0).make(64, rngs=nnx.Rngs(0))
    expected = 3 * (4 * 64**2 // 2 // 4 + 8)
    assert lcr.state_bytes(mixer.init_state(3, 10)) == lcr.state_bytes(mixer.init_state(3, 10**6)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, r"key_factor=0.5 with d_model=32 and num_heads=5: .* not 3.2"),
        ({"num_heads": 2, "value_factor": 0.7}, "value_factor=0.7 with d_model=32"),
        ({"gate_normalizer": -1.0}, "gate_normalizer=-1.0: expected a number above 0"),
        ({"gate_rank": 0}, "gate_rank=0: expected a whole number above 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer("gla", 32, rngs=nnx.Rngs(0), **options)


def test_without_a_gate():
    """With an output projection that changes nothing, the gate is a factor."""
    gated = GLAConfig(num_heads=2).make(32, rngs=nnx.Rngs(0))
    gated.out_proj.kernel.set_value(jnp.eye(32))
    plain = GLAConfig(num_heads=2, gate=False).make(32, rngs=nnx.Rngs(0))
    for (path, ours), (_, theirs) in zip(*map(parameters_but_the_gate, (plain, gated)), strict=True):
        ours.set_value(theirs[...])
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    factor = nnx.silu(x @ gated.gate_proj.kernel[...])
    assert_close(gated(x)[0], plain(x)[0] * factor, "float32")


def parameters_but_the_gate(mixer):
    return [(path, p) for path, p in nnx.to_flat_state(nnx.state(mixer, nnx.Param)) if "gate_proj" not in path]


def test_decays_are_held_above_the_least():
    """Held near 1, whatever the projection says, nothing decays; a bound below them all changes nothing."""
    def output(least, bias):
        mixer = GLAConfig(num_heads=2, least_log_decay=least).make(32, rngs=nnx.Rngs(0))
        mixer.decay_bias.set_value(jnp.full(mixer.decay_bias.shape, jnp.float32(bias)))
        return mixer(jax.random.normal(jax.random.key(0), (2, 9, 32)))[0]

    assert_close(output(-1e-9, -40.0), output(None, 40.0), "float32")
    assert_close(output(-100.0, 0.0), output(None, 0.0), "exact")
    with pytest.raises(ValueError, match="least_log_decay=0.5: expected None, or a number below 0"):
        GLAConfig(least_log_decay=0.5)
