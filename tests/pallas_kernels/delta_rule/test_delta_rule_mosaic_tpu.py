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


def test_refuses_many_heads_that_fill_whole_registers_all_together_alone():
    def call(length, heads, width):
        q = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
        jax.eval_shape(lambda q: delta_rule(q, q, q, q, q, implementation="mosaic_tpu"), q)

    with simulated():
        with pytest.raises(ValueError, match="on 31 of 72 keys"):
            call(4, 31, 72)
        for taken in ((1, 31, 72), (4, 32, 72), (4, 1, 2048)):
            call(*taken)


def test_one_token_of_states_that_do_not_fit_is_refused():
    q, v = (jax.ShapeDtypeStruct((8, 1, 28, width), jnp.bfloat16) for width in (256, 512))
    with simulated(), pytest.raises(ValueError, match="one token of 28 heads at once, here with a state of 256 x 512"):
        jax.eval_shape(lambda q, v: delta_rule(q, q, v, q, q, implementation="mosaic_tpu"), q, v)
