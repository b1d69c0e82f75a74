"""How sure one number is: intervals for proportions and means; and ranges that gaps and positions are counted in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnemon.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """A proportion (in 0..1) or a mean with the two ends of its confidence interval."""

    mean: float
    low: float
    high: float


def wilson_interval(num_right: float, num_samples: int, confidence: float = 0.95) -> Interval:
    """Give a proportion and its Wilson score interval.

    Args:
        num_right: successes, 0..num_samples. A sum of shares between 0 and 1, one per trial, may stand for the count:
            the interval is then wider than need be, because shares vary less than right and wrong.
        num_samples: trials, at least 1.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        The proportion and the two ends, inside 0..1 also at 0 % and 100 %.

    Raises:
        ConfigError: if a count or the confidence is out of range.

    Source:
        E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if num_samples < 1 or not 0 <= num_right <= num_samples:
        raise ConfigError(f"expected 0 <= num_right <= num_samples and num_samples >= 1, got {num_right}/{num_samples}")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must lie between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    mean = num_right / num_samples
    scale = 1 + z * z / num_samples
    centre = (mean + z * z / (2 * num_samples)) / scale
    half = z / scale * math.sqrt(mean * (1 - mean) / num_samples + (z / (2 * num_samples)) ** 2)
    return Interval(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)))


def bootstrap_mean(
    values: NDArray[np.floating[Any]], *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Give a mean with its percentile bootstrap interval.

    Args:
        values: one number per independent unit, [N], at least two.
        num_resamples: bootstrap draws, at least 1.
        confidence: coverage of the interval, in (0, 1).
        seed: seed of the local generator; the same seed gives the same interval.

    Returns:
        The mean and the two ends.

    Raises:
        ConfigError: there are fewer than two units.

    Source:
        B. Efron, Bootstrap methods: another look at the jackknife, Ann. Statist. 7 (1979).
    """
    if len(values) < 2:
        raise ConfigError(f"a bootstrap needs at least two units, got {len(values)}; measure more")
    rng = np.random.default_rng(seed)
    draws = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(num_resamples)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_ratio(
    numerators: NDArray[np.floating[Any]],
    denominators: NDArray[np.floating[Any]],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Give a ratio of sums, such as nats per word over documents, with its percentile bootstrap interval.

        ratio = sum(numerators) / sum(denominators)

    Args:
        numerators: one number per independent unit, [N], at least two.
        denominators: one positive number per unit, [N].
        num_resamples: bootstrap draws over units, at least 1.
        confidence: coverage of the interval, in (0, 1).
        seed: seed of the local generator; the same seed gives the same interval.

    Returns:
        The ratio and the two ends.

    Raises:
        ConfigError: there are fewer than two units, or the lengths differ.

    Source:
        B. Efron, Bootstrap methods: another look at the jackknife, Ann. Statist. 7 (1979).
    """
    count = len(numerators)
    if count < 2 or len(denominators) != count:
        raise ConfigError(f"expected at least two units on both sides, got {count} and {len(denominators)}")
    rng = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for number in range(num_resamples):
        chosen = rng.integers(count, size=count)
        draws[number] = numerators[chosen].sum() / denominators[chosen].sum()
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(numerators.sum() / denominators.sum()), float(low), float(high))


def octaves(largest: int) -> Iterator[tuple[int, int]]:
    """Go through the ranges 1, 2-3, 4-7, ... (both ends included) up to the one that holds `largest`."""
    first = 1
    while first <= largest:
        yield first, 2 * first - 1
        first *= 2
