"""The Hopper kernels on a simulated GPU, which takes milliseconds for every read: few tokens, in tiles of 8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_suite import conformance_tests
from pallas_kernels import devices
from pallas_kernels.selective_scan import conformance, mosaic_gpu, mosaic_gpu_parts, selective_scan
from pallas_kernels.selective_scan.conformance import Case
from pallas_kernels.selective_scan.shapes import Shape

CASES = {
    "one token, padded": Case(shape=Shape(B=3, T=1, D=40), packed=True),
    "one token": Case(shape=Shape(B=1, T=1, D=32)),
    "one tile": Case(shape=Shape(B=1, T=8, D=32), fresh=True),
    "ragged, wide blocks": Case(shape=Shape(B=2, T=21, D=64)),
    "packed": Case(shape=Shape(B=2, T=37, D=32), packed=True),
    "parts": Case(shape=Shape(B=1, T=45, D=32, N=8), steps="all"),
    "packed parts": Case(shape=Shape(B=2, T=45, D=32, N=8), packed=True),
    "64 states": Case(shape=Shape(B=1, T=13, D=32, N=64), packed=True),
    "small widths": Case(shape=Shape(B=2, T=11, D=24, N=5), steps=-16.0),
}


class TestMosaicGPU(conformance_tests(dataclasses.replace(conformance.SUITE, cases=CASES))):
    implementation = "mosaic_gpu"
    dtypes = (jnp.bfloat16,)
    run_twice = frozenset({"one tile"})

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch, request):
        name = request.node.callspec.params["name"]
        for module in (mosaic_gpu, mosaic_gpu_parts):
            monkeypatch.setattr(module, "LARGEST_TILE", 8)
        monkeypatch.setattr(mosaic_gpu, "BACKWARD", {8: (8, 4, 4), 16: (8, 4, 2), 64: (8, 2, 1)})
        monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 2 if "wide" in name else 132)
        monkeypatch.setattr(mosaic_gpu_parts, "LEAST", 2 if "parts" in name else 1000)

    def device(self):
        return devices.interpreting("gpu", detect_races=True)
