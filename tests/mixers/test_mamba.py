"""What is Mamba's own: the bytes of its state, and the scales it starts with."""

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from pallas_kernels.tolerances import assert_close


def build(**options):
    return lcr.make_mixer("mamba", 32, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_state_bytes(dtype, itemsize):
    mixer = build(state_size=5, expand=3, conv_width=4, dtype=dtype)
    inner = 3 * 32
    assert lcr.state_bytes(mixer.init_state(2, 10)) == 2 * (inner * 3 * itemsize + 4 * inner * 5 + 8)


def test_first_steps_and_decays_are_those_asked_for():
    mixer = build(dt_min=1e-6, dt_max=1e-2, dt_floor=1e-6, decay_scale=0.5, state_size=4)
    steps = np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    assert 0.99e-6 <= steps.min() < 1e-4 and 1e-3 < steps.max() <= 1.01e-2
    np.testing.assert_allclose(jnp.exp(mixer.A_log[...])[0], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)


def test_dt_scale_widens_the_step_projection_alone():
    plain, wide = build(), build(dt_scale=6.0)
    assert_close(wide.dt_kernel[...], 6 * plain.dt_kernel[...], "float32")
    np.testing.assert_array_equal(wide.dt_bias[...], plain.dt_bias[...])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 0}, "state_size=0: expected a whole number above 0"),
        ({"dt_rank": 0}, "dt_rank=0: expected a whole number above 0"),
        ({"dt_scale": -1.0}, r"dt_scale=-1\.0: expected a number above 0"),
        ({"inner_norm": "plane"}, "inner_norm: unknown value 'plane'. Did you mean 'plain'"),
        ({"inner_norm_eps": 0.0}, r"inner_norm_eps=0\.0: expected a number above 0"),
        ({"dt_min": 0.1, "dt_max": 0.01}, r"dt_min=0\.1: expected at most dt_max=0\.01"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
