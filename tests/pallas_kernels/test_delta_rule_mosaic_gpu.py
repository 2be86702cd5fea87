import jax.numpy as jnp
import pytest
from conformance_suite import conformance_tests
from pallas_kernels import devices
from pallas_kernels.delta_rule import conformance


class TestMosaicGPU(conformance_tests(conformance.SUITE)):
    implementation = "mosaic_gpu"
    dtypes = (jnp.bfloat16,)
    refused = frozenset({"small widths"})
    run_twice = frozenset({"packed", "vector, ragged"})

    def device(self):
        return devices.interpreting("gpu", detect_races=True)
