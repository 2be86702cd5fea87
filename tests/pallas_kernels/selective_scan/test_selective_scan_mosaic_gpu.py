import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_suite import conformance_tests
from pallas_kernels import devices
from pallas_kernels.selective_scan import conformance, selective_scan


class TestMosaicGPU(conformance_tests(conformance.SUITE)):
    implementation = "mosaic_gpu"
    dtypes = (jnp.bfloat16,)
    run_twice = frozenset({"one chunk"})

    def device(self):
        return devices.interpreting("gpu", detect_races=True)
