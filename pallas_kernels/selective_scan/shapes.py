"""The real shapes of the selective scan, named once: compile checks use these."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes by letter. gated: with z, the gate."""

    B: int
    T: int
    D: int
    N: int = 16
    gated: bool = False


REAL = {
    # A block of Mamba 1.4B: twice as wide inside as the model's 2,048; a token of it; and one long document
    "mamba_1b": Shape(B=4, T=2_048, D=4_096, gated=True),
    "mamba_1b_decode": Shape(B=32, T=1, D=4_096, gated=True),
    "mamba_1b_64k": Shape(B=1, T=65_536, D=4_096, gated=True),
}
