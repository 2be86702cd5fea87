"""DeltaNet and Gated DeltaNet: their betas, sizes, states and errors. (Equal to whole models of flash-linear-attention:
tests/pretrained.)"""

import functools

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.mixers.deltanet import DeltaNetConfig
from lcr.mixers.gated_deltanet import GatedDeltaNetConfig
from pallas_kernels.tolerances import assert_close


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_state_bytes(dtype, itemsize):
    """4 H K V + H (2 K + V) (conv_width - 1) itemsize + 8 for each sequence."""
    for name, options in (
        ("deltanet", {"num_heads": 4, "key_factor": 0.5, "value_factor": 0.75}),
        ("gated_deltanet", {"num_heads": 4, "head_dim": 4, "expand_v": 1.5}),
    ):
        mixer = lcr.make_mixer(name, 32, rngs=nnx.Rngs(0), conv_width=3, dtype=dtype, **options)
        heads, keys, values = 4, 4, 6
        expected = 2 * (4 * heads * keys * values + heads * (2 * keys + values) * 2 * itemsize + 8)
        assert lcr.state_bytes(mixer.init_state(2, 10)) == expected


@pytest.mark.parametrize(("d_model", "heads"), [(16, 1), (48, 3), (80, 5), (256, 4), (1040, 65)])
def test_default_sizes_suit_any_width(d_model, heads):
    width = d_model // heads
    assert DeltaNetConfig().head_sizes(d_model) == (heads, width, width)
    assert GatedDeltaNetConfig().head_sizes(d_model) == (heads, width, 2 * width)


@pytest.mark.parametrize("config", [DeltaNetConfig, functools.partial(GatedDeltaNetConfig, expand_v=1.0)])
def test_a_beta_of_one_replaces_what_the_state_says_of_a_key(config):
    """DeltaNet with beta near 1: a key seen twice gives its second value alone; with a beta near 2 the
    second twice less the first twice (S goes through 2 v_1 to 2 v_1 + 2 (v_2 - 2 v_1))."""
    for negative, expected in ((False, [0.0, 1.0]), (True, [-2.0, 2.0])):
        mixer = config(num_heads=1, conv_width=1, negative_eigenvalues=negative).make(16, rngs=nnx.Rngs(0))
        if hasattr(mixer, "A_log"):
            mixer.A_log.set_value(jnp.full((1,), -40.0))  # no decay
        mixer.beta.set_value(jnp.full((16, 1), 20.0))  # sigmoid of 20 or more
        mixer.heads.conv.weight.set_value(jnp.ones((1, 48)))
        kernel, x = np.zeros((16, 3, 16), np.float32), np.zeros((1, 2, 16), np.float32)
        kernel[2, :2, 0] = 1  # both tokens have the key of channel 2
        kernel[0, 2, 0] = kernel[1, 2, 1] = 1
        mixer.heads.proj.kernel.set_value(jnp.asarray(kernel.reshape(16, 48)))
        x[0, :, 2], x[0, 0, 0], x[0, 1, 1] = 10, 5, 5
        _, state = jax.jit(mixer.__call__)(x)
        found = np.asarray(state.memory)[0, 0, 0, :2] / (5 / (1 + np.exp(-5)))
        assert_close(found, np.array(expected), "float32")


def test_initial_decays_are_those_asked_for():
    mixer = GatedDeltaNetConfig(num_heads=64, dt_min=1e-4, dt_max=1e-2, decay_max=2.0).make(64, rngs=nnx.Rngs(0))
    steps = np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    rates = np.exp(mixer.A_log[...])
    assert 0.99e-4 < steps.min() < 1e-3 < 3e-3 < steps.max() < 1.01e-2
    assert 0 < rates.min() < 0.5 and 1.5 < rates.max() <= 2.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deltanet", {"num_heads": 5}, r"key_factor=1.0 with d_model=32 and num_heads=5: .* not 6.4"),
        ("deltanet", {"num_heads": 2, "value_factor": 0.7}, "value_factor=0.7 with d_model=32"),
        ("deltanet", {"conv_width": 0}, "conv_width=0: expected a whole number above 0"),
        ("gated_deltanet", {"num_heads": 5}, "num_heads=5 does not divide d_model=32"),
        ("gated_deltanet", {"head_dim": 5}, "head_dim=5 does not divide d_model=32"),
        ("gated_deltanet", {"head_dim": 8, "expand_v": 1.3}, "expand_v=1.3 with heads of width 8"),
        ("gated_deltanet", {"dt_min": 0.2}, r"dt_min=0.2: expected at most dt_max=0.1"),
        ("gated_deltanet", {"decay_max": -1.0}, r"decay_max=-1\.0: expected a number above 0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer(name, 32, rngs=nnx.Rngs(0), **options)
