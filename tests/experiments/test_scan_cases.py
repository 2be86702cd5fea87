"""The benchmark's rivals compute what the ops do: a rival that computed less would be no rival."""

import jax
import pytest
from experiments.scan_cases import head_cases, selective_case
from pallas_kernels.tolerances import assert_close

CASES = [selective_case(2, 20, 6), *head_cases(2, 20, 2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_rivals_agree(case):
    expected = jax.jit(case.ours)(*case.arguments)
    assert_close(jax.jit(case.associative)(*case.arguments), expected, "float32")
    if case.jla is not None:
        with jax.numpy_rank_promotion("allow"):  # theirs is not written for our strictness
            assert_close(jax.jit(case.jla)(*case.arguments), expected, "float32")
