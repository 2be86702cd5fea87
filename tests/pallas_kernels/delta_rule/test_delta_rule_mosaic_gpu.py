"""The Hopper kernels of the delta rule, simulated with races looked for: the op's suite at sizes that take a minute."""

import dataclasses

import jax.numpy as jnp
import pytest
from conformance_suite import conformance_tests
from numpy_programs import traced
from pallas_kernels import devices
from pallas_kernels.delta_rule import conformance, delta_rule
from pallas_kernels.delta_rule.conformance import Case
from pallas_kernels.delta_rule.shapes import Shape


def _shape(T, K=64, V=64, decay="scalar"):
    return Shape(B=1, T=T, H=1, K=K, V=V, decay=decay)


CASES = {
    "one token, padded": conformance.CASES["one token, padded"],
    "ragged, two panels of keys": Case(shape=_shape(63, K=128, V=128)),
    "packed": Case(shape=_shape(150), packed=True),
    "keys alike": Case(shape=_shape(128, decay="none"), keys="alike", fresh=True),
    "extreme gates": Case(shape=_shape(128), gates="extreme"),
    "vector, two panels of keys": Case(shape=_shape(64, K=128, decay="vector"), fresh=True),
    "vector, packed": Case(shape=_shape(150, decay="vector"), packed=True),
    "vector, extreme gates": Case(shape=_shape(128, decay="vector"), gates="extreme"),
}


class TestMosaicGPU(conformance_tests(dataclasses.replace(conformance.SUITE, cases=CASES))):
    implementation = "mosaic_gpu"
    program = staticmethod(traced)
    dtypes = (jnp.bfloat16,)
    run_twice = frozenset()

    def device(self):
        return devices.interpreting("gpu", detect_races=True)


@pytest.mark.parametrize(
    ("width", "value_width", "dtype", "decay", "reason"),
    [
        (64, 64, jnp.float32, None, "float32"),
        (16, 64, jnp.bfloat16, None, "K that is a multiple of 64, up to 256, and this is 16"),
        (64, 576, jnp.bfloat16, None, "V that is a multiple of 64, up to 512, and this is 576"),
        (256, 64, jnp.bfloat16, "vector", "K that is a multiple of 64, up to 192, and this is 256"),
    ],
)
def test_says_what_it_does_not_support(width, value_width, dtype, decay, reason):
    x, v = jnp.ones((1, 64, 1, width), dtype), jnp.ones((1, 64, 1, value_width), dtype)
    log_decay = None if decay is None else jnp.zeros(x.shape, jnp.float32)
    with devices.interpreting("gpu"), pytest.raises(ValueError, match=reason):
        delta_rule(x, x, v, x, x, log_decay, implementation="mosaic_gpu")


def test_is_for_hopper_alone():
    x = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="Hopper"):
        delta_rule(x, x, x, x, x, implementation="mosaic_gpu")
