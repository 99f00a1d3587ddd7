"""Means with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    """A mean of values from 0 on, with as much of Student's interval as is; endless for a single value."""
    n, centre = len(values), sum(values) / len(values)
    if n == 1:
        return Estimate(centre, 0.0, math.inf, n)
    deviation = math.sqrt(sum((value - centre) ** 2 for value in values) / (n - 1))
    half = _student(n - 1) * deviation / math.sqrt(n)
    return Estimate(centre, max(0.0, centre - half), centre + half, n)


def mcnemar(first_only: int, second_only: int) -> float:
    """The probability that two equally good ones differ so much or more in what only one of them gets right.

    Args:
        first_only: Pairs of which the first is right alone.
        second_only: Pairs of which the second is.

    Returns:
        The two-sided p-value, exact (McNemar, 1947; binomial with one half).
    """
    n, least = first_only + second_only, min(first_only, second_only)
    tail: int = sum(math.comb(n, i) for i in range(least + 1))
    outcomes: int = 2**n
    return min(1.0, 2 * tail / outcomes)


def paired_difference(clusters: Sequence[Sequence[float]], resamples: int = 2000) -> Estimate:
    """The mean of differences that come in clusters, with a percentile bootstrap interval over these.

    Args:
        clusters: Differences; those of a cluster are not independent.
        resamples: Draws of as many clusters, with replacement; always the same.
    """
    sums = np.array([sum(cluster) for cluster in clusters], dtype=np.float64)
    counts = np.array([len(cluster) for cluster in clusters], dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(clusters), size=(resamples, len(clusters)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()))


def _student(df: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun, 26.7.5; 3 % off for two degrees)."""
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    third = (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384
    return _Z + first / df + second / df**2 + third / df**3
