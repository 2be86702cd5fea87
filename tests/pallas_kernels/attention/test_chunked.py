import jax.numpy as jnp
import pytest
from attention_suite import AttentionSuite, assert_conforms
from numpy_programs import traced
from pallas_kernels.attention import conformance, tiles
from pallas_kernels.attention.conformance import Case
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.conformance import compiled


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """64 x 64, so that the cases have many."""
    monkeypatch.setattr(tiles, "SIDE", 64)


class TestChunked(AttentionSuite):
    implementation = "chunked"


class TestChunkedInHalfPrecision(AttentionSuite):
    """Evaluated, as a program for each case in each dtype takes long to compile; some of them below."""

    implementation = "chunked"
    program = staticmethod(traced)
    dtypes = (jnp.bfloat16,)
    run_twice = frozenset()


@pytest.mark.parametrize("name", ["soft cap and scale", "packed, window", "decode"])
def test_half_precision_as_compiled(name):
    assert_conforms(conformance.CASES[name], "chunked", jnp.bfloat16, compiled)


@pytest.mark.parametrize("window", [None, 100])
def test_eight_heads_together(window):
    assert_conforms(Case(shape=Shape(T=150, H=8, G=8, K=16, window=window)), "chunked", jnp.float32, compiled)
