"""Values from several seeds: how far they spread, and whether two sets of them differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kilter._check import fail

TWO_SIDED_95 = 1.959963984540054  # quantile of the normal distribution


class Difference(NamedTuple):
    """The mean of first - second over pairs of the same seed."""

    mean: float
    half: float  # of the 95 % confidence interval of the mean
    first_higher: int
    pairs: int

    @property
    def above(self) -> bool:
        """Whether the first is higher by more than chance would have it."""
        return self.mean > self.half

    @property
    def below(self) -> bool:
        """Whether the first is lower by more than chance would have it."""
        return self.mean < -self.half

    @property
    def clear(self) -> bool:
        """Whether they differ by more than chance would have it."""
        return self.above or self.below

    def __str__(self) -> str:
        return f"difference {round(self.mean, 9):+.3g} ± {self.half:.2g}"


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two things, each measured with the same seeds.

    The interval is mean ± t sd / sqrt(n), with sd the standard deviation of the differences and t the 97.5 % quantile
    of Student's distribution with n - 1 degrees of freedom: 95 % of such intervals hold the true mean difference.

    Raises
    ------
    KilterError
        The lengths differ, or are below 2.
    """
    if len(first) != len(second) or len(first) < 2:
        fail("first, second", "as many values in both, at least 2", f"{len(first)} and {len(second)}")
    gaps = np.subtract(first, second, dtype=np.float64)
    n = len(gaps)
    half = student(n - 1) * spread(gaps.tolist()) / math.sqrt(n)
    return Difference(float(gaps.mean()), half, int(np.sum(gaps > 0)), n)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution, to 1 % from 3 degrees of freedom on, exact for 1 and 2.

    References
    ----------
    Abramowitz, Stegun, 1964, Handbook of Mathematical Functions, 26.7.5.
    """
    if freedom <= 2:
        return (math.tan(math.pi * 0.475), math.sqrt(2 * 0.95**2 / (1 - 0.95**2)))[freedom - 1]
    z, v = TWO_SIDED_95, float(freedom)
    terms = (
        z,
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
    )
    return math.fsum(terms)


def spread(values: Sequence[float]) -> float:
    """The standard deviation of values from several seeds, n - 1 in the denominator."""
    return float(np.std(values, ddof=1))


def mean_and_spread(values: Sequence[float]) -> str:
    """Both in words, to three digits."""
    return f"{np.mean(values):.3g} ± {spread(values):.2g}"
