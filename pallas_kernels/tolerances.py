"""The one table of tolerances, and the one way to compare.

An error is the largest absolute difference divided by the largest absolute expected value (at least 1e-3, so that
a result that ought to be zero is held to an absolute bound); for the kinds of `ABSOLUTE` it is the difference itself. The
table means the same on every machine.
"""

import jax
import numpy as np

TOLERANCE = {
    # two float32 forms of one computation, and float32 against numbers made elsewhere
    "float32": 2e-5,
    "float32 gradient": 1e-4,
    "float32 oracle": 1e-4,
    # logits of whole checkpoints of a few layers (up to 10) against the float32 of others, which is itself up to 8e-5 from
    # float64; absolute
    "pretrained": 2e-4,
    # a form run in float64 against a float64 oracle (limited by the oracle's own rounding where that is float32)
    "float64": 1e-10,
    "float64 against float32 oracle": 1e-5,
    # A float32 recurrence of 65,536 steps against float64. A state of a float32 cannot decay by less than 6e-8 a
    # step: the factor exp(dt A) is rounded to 1 or 1 - 6e-8, and each step rounds the state again. Worst case
    # 65,536 x 2^-25 = 2e-3; the token loop's own error is 1.4e-4 where dt is about 1e-7.
    "float32 recurrence of 65,536 steps": 3e-4,
    # bfloat16 inputs and compute (8 bits of mantissa, 2^-8 = 4e-3) against the same in float32
    "bfloat16": 4e-2,
    "bfloat16 gradient": 8e-2,
    # a bfloat16 call in pieces against the whole: float32 accumulators of the same rounded activations, by the same
    # program; an accumulator that were itself rounded between the pieces would be off by 2e-3 and more
    "bfloat16 cut": 1e-3,
    # the same numbers by the same operations: nothing may differ
    "exact": 0.0,
}
ABSOLUTE = {"pretrained"}


def error(actual, expected, *, absolute: bool = False) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape} instead of {expected.shape}")
    if not np.isfinite(expected).all():
        raise AssertionError("the expected value is not finite")
    if not np.isfinite(actual).all():
        raise AssertionError("the actual value is not finite")
    if actual.size == 0:
        return 0.0
    scale = 1.0 if absolute else max(np.abs(expected).max(), 1e-3)
    return float(np.abs(actual - expected).max() / scale)


def assert_close(actual, expected, kind: str, what: str = "") -> None:
    """Holds every leaf of two pytrees to `TOLERANCE[kind]`, naming the leaf that differs."""
    actual_leaves, actual_tree = jax.tree_util.tree_flatten_with_path(actual)
    expected_leaves, expected_tree = jax.tree_util.tree_flatten_with_path(expected)
    assert actual_tree == expected_tree, f"{what}: {actual_tree} instead of {expected_tree}"
    for (path, a), (_, e) in zip(actual_leaves, expected_leaves, strict=True):
        found = error(a, e, absolute=kind in ABSOLUTE)
        name = what + jax.tree_util.keystr(path)
        assert found <= TOLERANCE[kind], f"{name}: error {found:.2e} above {TOLERANCE[kind]:.0e} ({kind})"
