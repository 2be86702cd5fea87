"""The TPU's kernels, simulated: memory spaces, copies and semaphores, with races looked for."""

import jax.numpy as jnp
import pytest
from attention_suite import AttentionSuite
from pallas_kernels import devices
from pallas_kernels.attention import mosaic_tpu


class TestMosaicTPU(AttentionSuite):
    implementation = "mosaic_tpu"
    dtypes = (jnp.float32,)

    def device(self):
        return devices.interpreting("tpu", detect_races=True)

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch):
        """128 x 128, so that the cases have many."""
        monkeypatch.setattr(mosaic_tpu, "ROWS", 128)
        monkeypatch.setattr(mosaic_tpu, "KEYS", 128)
