"""Intervals for proportions."""

import math

Z_95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927, JASA 22:209): 95% for the default `z`.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    p = successes / n, n = trials

    It supposes independent trials. Unlike p -+ z sqrt(p (1 - p) / n) it stays in [0, 1] and has a width at 0 of n
    and at n of n: 20 right answers of 20 give (0.84, 1).

    Raises ValueError if `trials < 1` or `successes` is not in [0, trials].
    """
    if trials < 1:
        raise ValueError(f"trials={trials}: expected at least 1")
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes}: expected a number from 0 to trials={trials}")
    proportion = successes / trials
    scale = 1 + z * z / trials
    centre = (proportion + z * z / (2 * trials)) / scale
    half = z * math.sqrt(proportion * (1 - proportion) / trials + z * z / (4 * trials * trials)) / scale
    # the ends are exactly 0 and 1 at the extremes; rounding must not push them past
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high
