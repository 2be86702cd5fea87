import jax
import jax.numpy as jnp
import pytest
from conformance_suite import conformance_tests
from numpy_programs import traced
from pallas_kernels import devices
from pallas_kernels.linear_attention import conformance, linear_attention


class TestMosaicGPU(conformance_tests(conformance.SUITE)):
    implementation = "mosaic_gpu"
    program = staticmethod(traced)
    dtypes = (jnp.bfloat16,)
    refused = frozenset({"small widths", "small widths, channel"})
    run_twice = frozenset({"one token, padded", "groups"})

    def device(self):
        return devices.interpreting("gpu", detect_races=True)


def test_conforms_in_float16():
    case = conformance.CASES["one chunk"]
    with devices.interpreting("gpu", detect_races=True):
        for what, error, _ in conformance.SUITE.errors(
            case, "mosaic_gpu", jnp.float16, twice=False, program=traced, reference=traced
        ):
            assert error < 4e-3, what


@pytest.mark.parametrize(
    ("width", "dtype", "reason"),
    [(64, jnp.float32, "float32"), (48, jnp.bfloat16, "48 and 64"), (320, jnp.bfloat16, "320")],
)
def test_says_what_it_does_not_support(width, dtype, reason):
    x, v = jnp.ones((1, 64, 1, width), dtype), jnp.ones((1, 64, 1, 64), dtype)
    with devices.interpreting("gpu"), pytest.raises(ValueError, match=reason):
        linear_attention(x, x, v, implementation="mosaic_gpu")


def test_is_for_hopper_alone():
    x = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="Hopper"):
        linear_attention(x, x, x, implementation="mosaic_gpu")


def test_a_token_changes_the_state_in_place():
    x, state = jnp.ones((2, 1, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 2, 64, 64), jnp.float32)

    def step(state):
        return linear_attention(x, x, x, initial_state=state, implementation="mosaic_gpu")

    with devices.interpreting("gpu"):
        jaxpr = jax.make_jaxpr(step)(state)
    assert "freeze" in str(jaxpr)
