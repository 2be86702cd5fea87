import jax.numpy as jnp
import pytest
from attention_suite import AttentionSuite, assert_conforms
from pallas_kernels.attention import tiles
from pallas_kernels.attention.conformance import Case
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.conformance import compiled


class TestChunked(AttentionSuite):
    implementation = "chunked"
    dtypes = (jnp.float32, jnp.bfloat16)

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch):
        """64 x 64, so that the cases have many."""
        monkeypatch.setattr(tiles, "SIDE", 64)

    @pytest.mark.parametrize("window", [None, 100])
    def test_eight_heads_together(self, window):
        assert_conforms(Case(shape=Shape(T=150, H=8, G=8, K=16, window=window)), "chunked", jnp.float32, compiled)
