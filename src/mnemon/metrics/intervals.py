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


def crossed_bootstrap(
    values: NDArray[np.floating[Any]], *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[Interval, float]:
    """Give the mean over two crossed factors, training seeds and samples, with its interval and the p value of mean 0.

    Seeds and samples are resampled independently, so that the interval covers the choice of both; with one seed it
    covers the samples alone. Few seeds are a small sample: with three the interval is rather too narrow.

    Args:
        values: one number per seed and sample, [S, N], each at least 1.
        num_resamples: bootstrap draws, at least 1.
        confidence: coverage of the interval, in (0, 1).
        seed: seed of the local generator; the same seed gives the same interval.

    Returns:
        The mean with the two ends, and the two-sided p value in 0..1: twice the share of draws on the wrong side of 0.

    Raises:
        ConfigError: there is no value.

    Source:
        A. B. Owen, The pigeonhole bootstrap, Ann. Appl. Stat. 1 (2007), arXiv:0712.1111.
    """
    if values.ndim != 2 or values.size == 0:
        raise ConfigError(f"a crossed bootstrap needs values of seeds and samples, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    seeds, samples = values.shape
    draws = np.empty(num_resamples)
    for number in range(num_resamples):
        columns = np.bincount(rng.integers(samples, size=samples), minlength=samples)
        rows = np.bincount(rng.integers(seeds, size=seeds), minlength=seeds)
        draws[number] = rows @ (values @ columns) / values.size
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    beyond = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    p_value = min(1.0, 2 * (beyond + 1) / (num_resamples + 1))
    return Interval(float(values.mean()), float(low), float(high)), p_value


def octaves(largest: int) -> Iterator[tuple[int, int]]:
    """Go through the ranges 1, 2-3, 4-7, ... (both ends included) up to the one that holds `largest`."""
    first = 1
    while first <= largest:
        yield first, 2 * first - 1
        first *= 2
