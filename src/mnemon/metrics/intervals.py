"""How sure one number is: intervals for proportions and means; and ranges that gaps and positions are counted in."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from mnemon.errors import ConfigError

_BLOCK = 500  # draws at once: bounds the memory of many samples


@dataclass(frozen=True)
class Interval:
    """A proportion (in 0..1) or a mean with the two ends of its confidence interval."""

    mean: float
    low: float
    high: float


def within(interval: Interval, lowest: float, highest: float) -> Interval:
    """Cut an interval off where its quantity ends: stretched for few seeds, a bootstrap's may reach beyond."""
    return Interval(interval.mean, max(lowest, interval.low), min(highest, interval.high))


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


def crossed_bootstrap(
    values: NDArray[np.floating[Any]], *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[Interval, float]:
    """Give the mean over two crossed factors, training seeds and samples, with its interval and the p value of mean 0.

    Seeds and samples are resampled independently, so that the interval covers the choice of both; with one seed it
    covers the samples alone. A bootstrap of few units is too narrow, so the deviations of its draws are stretched to

        sqrt(s²_samples / N + s²_seeds / S) t(df),   df by Satterthwaite,

    where s² are the variances of the means over the other factor. Measured coverage of 95 % intervals of accuracies
    (50 and 200 samples, seeds that differ not at all or by 10 points): 95 to 98 % with five seeds, 92 to 99 % with
    three, 87 to 98 % with two.

    Args:
        values: one number per seed and sample, [S, N], each at least 1.
        num_resamples: bootstrap draws, at least 1.
        confidence: coverage of the interval, in (0, 1).
        seed: seed of the local generator; the same seed gives the same interval.

    Returns:
        The mean with the two ends, and the two-sided p value in 0..1 of the same t.

    Raises:
        ConfigError: there is no value.

    Source:
        A. B. Owen, The pigeonhole bootstrap, Ann. Appl. Stat. 1 (2007), arXiv:0712.1111; F. E. Satterthwaite, An
        approximate distribution of estimates of variance components, Biometrics Bulletin 2 (1946).
    """
    return _crossed([(1, values)], num_resamples, confidence, seed)


def crossed_difference(
    first: NDArray[np.floating[Any]],
    second: NDArray[np.floating[Any]],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Interval, float]:
    """Give the difference of two means over seeds and the same samples, with its interval and the p value of no change.

    As `crossed_bootstrap`; samples are resampled together, the seeds of each model on their own.

    Args:
        first: one number per seed and sample, [S1, N].
        second: one number per seed and sample, [S2, N], the same samples.
        num_resamples: bootstrap draws, at least 1.
        confidence: coverage of the interval, in (0, 1).
        seed: seed of the local generator.

    Returns:
        mean(first) - mean(second) with the two ends, and the two-sided p value in 0..1.

    Raises:
        ConfigError: there is no value, or the numbers of samples differ.
    """
    if first.shape[-1] != second.shape[-1]:
        raise ConfigError(f"a paired test needs the same samples, got {first.shape[-1]} and {second.shape[-1]}")
    return _crossed([(1, first), (-1, second)], num_resamples, confidence, seed)


def _crossed(
    groups: Sequence[tuple[int, NDArray[np.floating[Any]]]], num_resamples: int, confidence: float, seed: int
) -> tuple[Interval, float]:
    """Estimate the signed sum of the groups' means; every group is [seeds, samples], the samples are the same."""
    for _, values in groups:
        if values.ndim != 2 or values.size == 0:
            raise ConfigError(f"a crossed bootstrap needs values of seeds and samples, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    per_sample = np.sum([sign * values.mean(axis=0) for sign, values in groups], axis=0)
    mean, samples = float(per_sample.mean()), len(per_sample)
    parts = [(per_sample, samples)] + [(values.mean(axis=1), len(values)) for _, values in groups]
    known = [(float(means.var(ddof=1)) / count, count - 1) for means, count in parts if count > 1]
    variance = sum(part for part, _ in known)
    if variance <= 1e-24:  # every sample says the same: what is left is how unlikely that would be by sign alone
        return Interval(mean, mean, mean), 1.0 if mean == 0 else min(1.0, 2.0 ** (1 - samples))
    degrees = variance**2 / sum(part**2 / freedom for part, freedom in known)
    deviations = _crossed_draws(groups, samples, num_resamples, rng) - mean
    tail = (1 - confidence) / 2
    low, high = np.quantile(deviations, [tail, 1 - tail])
    reach = math.sqrt(variance) * float(stdtrit(degrees, 1 - tail))
    spread = float(deviations.std()) * NormalDist().inv_cdf(1 - tail)
    stretch = reach / spread if spread > 0 else 0.0
    p_value = min(1.0, 2 * float(stdtr(degrees, -abs(mean) / math.sqrt(variance))))
    return Interval(mean, min(mean, mean + float(low) * stretch), max(mean, mean + float(high) * stretch)), p_value


def _crossed_draws(
    groups: Sequence[tuple[int, NDArray[np.floating[Any]]]], samples: int, count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    draws = np.zeros(count)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        columns = _resampling_weights(samples, size, rng)
        for sign, values in groups:
            rows = _resampling_weights(len(values), size, rng)
            draws[start : start + size] += sign * np.sum((rows @ values) * columns, axis=1)
    return draws


def _resampling_weights(count: int, num_resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Give how often each of `count` units is drawn in every resample, over `count`: [num_resamples, count]."""
    drawn = rng.integers(count, size=(num_resamples, count)) + count * np.arange(num_resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=num_resamples * count).reshape(num_resamples, count) / count


def octaves(largest: int) -> Iterator[tuple[int, int]]:
    """Go through the ranges 1, 2-3, 4-7, ... (both ends included) up to the one that holds `largest`."""
    first = 1
    while first <= largest:
        yield first, 2 * first - 1
        first *= 2
