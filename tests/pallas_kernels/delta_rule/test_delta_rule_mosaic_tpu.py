"""The TPU's kernels, simulated: memory spaces, copies and semaphores, with races looked for."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conformance_suite import assert_conforms, conformance_tests
from numpy_programs import traced
from pallas_kernels import devices
from pallas_kernels.delta_rule import conformance, delta_rule, mosaic_tpu_scalar, mosaic_tpu_scalar_backward
from pallas_kernels.delta_rule.shapes import Shape

simulated = functools.partial(devices.interpreting, "tpu", detect_races=True)


class TestDeltaRule(conformance_tests(conformance.SUITE)):
    implementation = "mosaic_tpu"
    program = staticmethod(traced)
    run_twice = frozenset({"packed", "one token"})

    def device(self):
        return simulated()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (Shape(B=1, T=140, H=1, K=64, V=64, decay="none"), {"keys": "alike"}),
        (Shape(B=1, T=70, H=4, K=64, V=64), {"gates": "extreme"}),  # two packs of two heads at once
        (Shape(B=1, T=70, H=8, K=64, V=64, decay="vector"), {"gates": "extreme"}),  # four packs, two in lockstep
    ],
)
def test_bfloat16(shape, options):
    case = conformance.Case(shape=shape, **options)
    with simulated():
        assert_conforms(conformance.SUITE, case, "mosaic_tpu", jnp.bfloat16)


def test_values_wider_than_a_block_of_instructions_takes(monkeypatch):
    """Their units are then counted through, and several blocks belong to one pack."""
    for module in (mosaic_tpu_scalar, mosaic_tpu_scalar_backward):
        monkeypatch.setattr(module, "UNITS", 1)
    monkeypatch.setattr(mosaic_tpu_scalar, "READ_UNITS", 1)
    case = conformance.Case(shape=Shape(B=1, T=70, H=2, K=128, V=256), gates="slow")
    with simulated():
        assert_conforms(conformance.SUITE, case, "mosaic_tpu", jnp.float32)


def test_says_what_it_does_not_support():
    q = jnp.zeros((1, 4, 1, 16))
    with pytest.raises(ValueError, match="needs a TPU"):
        delta_rule(q, q, q, q, q, implementation="mosaic_tpu")
    half = q.astype(jnp.float16)
    with simulated(), pytest.raises(ValueError, match="float16"):
        delta_rule(half, half, half, half, half, implementation="mosaic_tpu")
    jax.eval_shape(delta_rule, q, q, q, q, q)  # by default another one is taken
