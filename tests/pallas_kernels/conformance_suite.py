"""The conformance suites of the scans as classes of tests: a backend is a subclass that says what it is and where it runs."""

import contextlib

import jax.numpy as jnp
import pytest
from numpy_programs import traced
from pallas_kernels.conformance import Suite, compiled
from pallas_kernels.tolerances import TOLERANCE


def conformance_tests(suite: Suite) -> type:
    class Tests:
        implementation: str
        program = staticmethod(compiled)  # of a simulated kernel: `traced`
        run_by_program = frozenset(suite.cases)  # the others are evaluated
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
                            suite.prepare(case, self.implementation, dtype)()
                        continue
                    twice, program = name in self.run_twice, self.program if name in self.run_by_program else traced
                    assert_within(
                        suite.errors(case, self.implementation, dtype, twice=twice, program=program, reference=traced)
                    )

    return Tests


def assert_within(errors):
    for what, error, kind in errors:
        assert error <= TOLERANCE[kind], f"{what}: error {error:.2e} above {TOLERANCE[kind]:.0e} ({kind})"


def assert_conforms(suite: Suite, case, implementation, dtype):
    """Of a simulated kernel, on a case of its own."""
    assert_within(suite.errors(case, implementation, dtype, twice=False, program=traced, reference=traced))
