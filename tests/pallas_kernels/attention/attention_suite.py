"""The conformance suite as a class of tests: a backend is a subclass that says what it is and where it runs."""

import contextlib

import jax.numpy as jnp
import pytest
from numpy_programs import traced
from pallas_kernels.attention import conformance
from pallas_kernels.conformance import compiled
from pallas_kernels.tolerances import TOLERANCE


def assert_conforms(case, implementation, dtype, program, twice=False):
    for what, error, kind in conformance.errors(
        case, implementation, dtype, twice=twice, program=program, reference=traced
    ):
        assert error <= TOLERANCE[kind], f"{what}: error {error:.2e} above {TOLERANCE[kind]:.0e} ({kind})"


class AttentionSuite:
    implementation: str
    program = staticmethod(compiled)  # of a simulated kernel: `traced`
    dtypes = (jnp.float32,)
    refused: frozenset[str] = frozenset()  # cases that it does not support, and has to say so
    run_twice = frozenset(conformance.CASES)  # a simulated device is slow, so there these are a few

    def device(self):
        """A context in which the implementation runs."""
        return contextlib.nullcontext()

    @pytest.mark.parametrize("name", conformance.CASES)
    def test_conforms(self, name):
        case = conformance.CASES[name]
        with self.device():
            for dtype in self.dtypes:
                if name in self.refused:
                    with pytest.raises(ValueError, match=f"implementation='{self.implementation}'"):
                        conformance.prepare(case, self.implementation, dtype)()
                    continue
                assert_conforms(case, self.implementation, dtype, self.program, twice=name in self.run_twice)
