"""The real shapes of RWKV-4's weighted average, named once: compile checks use these."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes by letter."""

    B: int
    T: int
    D: int


REAL = {
    # RWKV-4 1.5B, and a token of it
    "rwkv4_1b": Shape(B=4, T=2_048, D=2_048),
    "rwkv4_1b_decode": Shape(B=32, T=1, D=2_048),
}
