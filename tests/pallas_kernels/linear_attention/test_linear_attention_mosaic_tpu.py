"""The TPU's kernels, simulated: memory spaces, copies and semaphores, with races looked for."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conformance_suite import assert_conforms, conformance_tests
from numpy_programs import evaluated, traced
from pallas_kernels import devices
from pallas_kernels.linear_attention import conformance, linear_attention
from pallas_kernels.linear_attention.shapes import Shape
from pallas_kernels.tolerances import assert_close

simulated = functools.partial(devices.interpreting, "tpu", detect_races=True)


class TestLinearAttention(conformance_tests(conformance.SUITE)):
    implementation = "mosaic_tpu"
    program = staticmethod(traced)
    run_twice = frozenset({"packed", "one token"})

    def device(self):
        return simulated()


@pytest.mark.parametrize(
    "shape",
    [
        Shape(B=1, T=140, H=2, K=128, V=64, decay="token", G=1),
        Shape(B=1, T=140, H=4, K=64, V=64, decay="channel", bonus=True),  # two packs of two heads at once
    ],
)
def test_bfloat16(shape):
    case = conformance.Case(shape=shape, gates="extreme")
    with simulated():
        assert_conforms(conformance.SUITE, case, "mosaic_tpu", jnp.bfloat16)


def test_a_decay_a_head_over_several_chunks():
    """Its gradient adds up over them."""
    case = conformance.Case(shape=Shape(B=1, T=300, H=2, K=64, V=64, decay="head"))
    with simulated():
        assert_conforms(conformance.SUITE, case, "mosaic_tpu", jnp.float32)


@pytest.mark.parametrize("decay", ["head", "token"])
def test_several_heads_in_a_tile_of_several_registers(decay):
    case = conformance.Case(shape=Shape(B=1, T=140, H=4, K=32, V=96, decay=decay))
    with simulated():
        assert_conforms(conformance.SUITE, case, "mosaic_tpu", jnp.float32)


@pytest.mark.parametrize("decay, value", [("none", 64), ("head", 64), ("head", 512), ("token", 512)])
def test_heads_that_share_keys(decay, value):
    """Several of them in a tile, or one in two tiles; where log decays differ by token, the suite has the former."""
    case = conformance.Case(shape=Shape(B=1, T=128, H=4, K=128, V=value, decay=decay, G=1), gates="slow")
    with simulated():
        assert_conforms(conformance.SUITE, case, "mosaic_tpu", jnp.float32)


def test_more_sums_of_a_pack_than_a_register_has_lanes():
    """Each of them is a lane: two of a head, whose log decays are summed up in two parts. (Forward: it takes long.)"""
    case = conformance.Case(shape=Shape(B=1, T=100, H=72, K=128, V=16, decay="token", G=1))
    floats, _ = conformance.SUITE.inputs(case)
    floats = {name: jnp.asarray(x, jnp.float32) for name, x in floats.items()}
    expected = evaluated(lambda floats: linear_attention(**floats, implementation="reference"))(floats)
    with simulated():
        found = evaluated(lambda floats: linear_attention(**floats, implementation="mosaic_tpu"))(floats)
    assert_close(list(found), list(expected), "float32")


def test_says_what_it_does_not_support():
    q, v = jnp.zeros((1, 4, 1, 16)), jnp.zeros((1, 4, 1, 16))
    with pytest.raises(ValueError, match="needs a TPU"):
        linear_attention(q, q, v, implementation="mosaic_tpu")
    half = q.astype(jnp.float16)
    with simulated(), pytest.raises(ValueError, match="float16"):
        linear_attention(half, half, half, implementation="mosaic_tpu")
    jax.eval_shape(linear_attention, q, q, v)  # by default another one is taken
