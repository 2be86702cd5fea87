import jax.numpy as jnp
import pytest
from attention_suite import AttentionSuite
from pallas_kernels.attention import tiles


class TestChunked(AttentionSuite):
    implementation = "chunked"
    dtypes = (jnp.float32, jnp.bfloat16)

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch):
        """64 x 64, so that the cases have many."""
        monkeypatch.setattr(tiles, "SIDE", 64)
