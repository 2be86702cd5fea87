"""ALiBi (arXiv 2108.12409): scores less a multiple of the distance, another multiple for each head."""

import numpy as np

from lcr.checks import check_whole


def alibi_slopes(heads: int) -> np.ndarray:
    """`2^(-8 h / n)` for h in 1 .. n, where the number n of heads is a power of two (section 3); float64 `[n]`.

    For other numbers (the authors' released code): those of the next lower power of two m, then every second one of
    2 m heads, from the first.
    """
    check_whole(heads=heads)
    lower = 2 ** (heads.bit_length() - 1)

    def slopes(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    return np.concatenate([slopes(lower), slopes(2 * lower)[::2][: heads - lower]])
