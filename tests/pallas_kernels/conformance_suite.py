"""The conformance suites of the scans as classes of tests: a backend is a subclass that says what it is and where it runs."""

import contextlib

import jax.numpy as jnp
import pytest
from pallas_kernels.conformance import Suite
from pallas_kernels.tolerances import TOLERANCE


def conformance_tests(suite: Suite) -> type:
    class Tests:
        implementation: str
        dtypes = (jnp.float32,)
        refused: frozenset[str] = frozenset()  # cases that it does not support, and has to say so
        run_twice = frozenset(suite.cases)  # a simulated device is slow, so there these are a few

        def device(self):
            """A context in which the implementation runs."""
            return contextlib.nullcontext()

        @pytest.mark.parametrize("name", suite.cases)
        def test_conforms(self, name):
            case = suite.cases[name]
            with self.device():
                for dtype in self.dtypes:
                    if name in self.refused:
                        with pytest.raises(ValueError, match=f"implementation='{self.implementation}'"):
                            suite.compute(case, self.implementation, dtype)
                        continue
                    for what, error, kind in suite.errors(
                        case, self.implementation, dtype, twice=name in self.run_twice
                    ):
                        assert error <= TOLERANCE[kind], (
                            f"{dtype.__name__} {what}: error {error:.2e} above {TOLERANCE[kind]:.0e} ({kind})"
                        )

    return Tests
