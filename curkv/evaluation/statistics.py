"""Means with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Attributes:
        mean: The mean.
        low: Lower end of its 95 % interval.
        high: Upper end.
        samples: How many there are.
    """

    mean: float
    low: float
    high: float
    samples: int


def proportion(values: Sequence[float]) -> Estimate:
    """A mean of values from 0 to 1, with Wilson's score interval (Wilson, 1927).

    It is exact enough for few samples and for means of 0 and 1, and wide for values between 0 and 1.
    """
    n, mean = len(values), sum(values) / len(values)
    scale = 1 + _Z**2 / n
    centre = (mean + _Z**2 / (2 * n)) / scale
    half = _Z / scale * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)), n)


def mean(values: Sequence[float]) -> Estimate:
    """A mean of any values, with Student's interval, which is endless for a single value."""
    n, centre = len(values), sum(values) / len(values)
    if n == 1:
        return Estimate(centre, -math.inf, math.inf, n)
    deviation = math.sqrt(sum((value - centre) ** 2 for value in values) / (n - 1))
    half = _student(n - 1) * deviation / math.sqrt(n)
    return Estimate(centre, centre - half, centre + half, n)


def _student(df: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun, 26.7.5; 3 % off for two degrees)."""
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    third = (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384
    return _Z + first / df + second / df**2 + third / df**3
