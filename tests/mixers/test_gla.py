"""Gated linear attention: its sizes and its errors. (Equal to a model of flash-linear-attention: tests/pretrained.)"""


import jax
import jax.numpy as jnp
import lcr
import pytest
from flax import nnx
from lcr.mixers.gla import GLAConfig
from pallas_kernels.tolerances import assert_close


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
