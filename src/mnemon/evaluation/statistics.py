"""Tests for accuracies: whether two models really differ.

Everything works on plain sequences of right/wrong marks. Two models are only ever compared on the same samples
(paired), which is what makes a hundred samples say something.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from mnemon.errors import ConfigError
from mnemon.metrics.intervals import Interval, crossed_difference

Correction = Literal["holm", "bh"]
CORRECTIONS: dict[Correction, str] = {"holm": "Holm", "bh": "Benjamini–Hochberg"}


@dataclass(frozen=True)
class PairedTest:
    """Comparison of two models on the same samples.

    Attributes:
        only_first: samples that the first model alone answered rightly; None where not every score is one mark.
        only_second: samples that the second model alone answered rightly; None where not every score is one mark.
        difference: accuracy of the first minus that of the second, with its bootstrap interval.
        p_value: exact two-sided McNemar test; without counts that of the crossed bootstrap.
    """

    only_first: int | None
    only_second: int | None
    num_samples: int
    difference: Interval
    p_value: float


def unpaired_difference(first: Interval, second: Interval) -> Interval:
    """Give the difference of two proportions measured on different samples, with its interval.

    Args:
        first: proportion with its Wilson interval.
        second: proportion with its Wilson interval of the same confidence.

    Returns:
        first - second, in -1..1, with an interval of that confidence.

    Source:
        R. G. Newcombe, Interval estimation for the difference between independent proportions, Statist. Med. 17 (1998),
        method 10.
    """
    difference = first.mean - second.mean
    below = math.hypot(first.mean - first.low, second.high - second.mean)
    above = math.hypot(first.high - first.mean, second.mean - second.low)
    return Interval(difference, difference - below, difference + above)


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Test whether two models have the same accuracy on the same samples.

    Only the samples on which exactly one of them is right carry information; under the null hypothesis each is a fair
    coin. Without such a sample the p value is 1.

    Args:
        first: marks of the first model, one per sample.
        second: marks of the second model on the same samples in the same order.

    Returns:
        Two-sided p value in 0..1.

    Raises:
        ConfigError: if the lengths differ.
    """
    only_first, only_second = _discordant(first, second)
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def paired_bootstrap(
    first: Sequence[bool],
    second: Sequence[bool],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Give the difference of two accuracies with its percentile bootstrap interval, resampling whole pairs.

    Args:
        first: marks of the first model, one per sample.
        second: marks of the second model on the same samples in the same order.
        num_resamples: bootstrap draws, at least 1.
        confidence: coverage of the interval, in (0, 1).
        seed: seed of the local generator; the same seed gives the same interval.

    Returns:
        accuracy(first) - accuracy(second), in -1..1, and its interval.

    Raises:
        ConfigError: if the lengths differ or there is no sample.
    """
    only_first, only_second = _discordant(first, second)
    num_samples = len(first)
    if num_samples == 0:
        raise ConfigError("a paired bootstrap needs at least one sample, got none")
    # A resample of pairs is a multinomial draw over (first only, second only, both or none): no index matrix needed.
    shares = np.array([only_first, only_second, num_samples - only_first - only_second]) / num_samples
    draws = np.random.default_rng(seed).multinomial(num_samples, shares, size=num_resamples)
    differences = (draws[:, 0] - draws[:, 1]) / num_samples
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return Interval((only_first - only_second) / num_samples, float(low), float(high))


def paired_test(first: Sequence[bool], second: Sequence[bool], *, seed: int = 0) -> PairedTest:
    """Compare two models on the same samples: McNemar's p value and the bootstrapped difference.

    Args:
        first: marks of the first model, one per sample, at least one.
        second: marks of the second model on the same samples in the same order.
        seed: seed of the bootstrap.

    Returns:
        Counts of one-sided successes, difference with 95 % interval, p value (not corrected for many tests).

    Raises:
        ConfigError: if the lengths differ or there is no sample.
    """
    only_first, only_second = _discordant(first, second)
    difference = paired_bootstrap(first, second, seed=seed)
    return PairedTest(only_first, only_second, len(first), difference, mcnemar_exact(first, second))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for the number of tests made together (step-down, family-wise error).

    Args:
        p_values: uncorrected p values in 0..1.

    Returns:
        Corrected p values in the same order, never smaller than the uncorrected ones.

    Source:
        S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    corrected = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = running
    return corrected


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Correct p values so that a share of the differences found, not the chance of any false one, is bounded.

    corrected p_(i) = min over j >= i of p_(j) m / j for the sorted p_(1) <= ... <= p_(m).

    Args:
        p_values: uncorrected p values in 0..1.

    Returns:
        Corrected p values in the same order, never smaller than the uncorrected ones nor greater than Holm's.

    Source:
        Y. Benjamini, Y. Hochberg, Controlling the false discovery rate, J. R. Statist. Soc. B 57 (1995).
    """
    corrected = [1.0] * len(p_values)
    running = 1.0
    ranked = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank in range(len(p_values), 0, -1):
        index = ranked[rank - 1]
        running = min(running, p_values[index] * len(p_values) / rank)
        corrected[index] = max(running, p_values[index])  # rounding must not lower a p value
    return corrected


def correct(p_values: Sequence[float], method: Correction) -> list[float]:
    """Correct p values for the number of tests made together: "holm" (any false difference) or "bh" (their share)."""
    return holm(p_values) if method == "holm" else benjamini_hochberg(p_values)


def crossed_test(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]], *, seed: int = 0) -> PairedTest:
    """Compare two models on the same samples where a model may have several training seeds, or scores are no marks.

    Args:
        first: scores of the first model, [S1, N]: a row per training seed.
        second: scores of the second model on the same samples, [S2, N].
        seed: seed of the bootstrap.

    Returns:
        The difference with its interval and p value over seeds and samples; no counts.

    Raises:
        ConfigError: if the numbers of samples differ or there is none.
    """
    difference, p_value = crossed_difference(first, second, seed=seed)
    return PairedTest(None, None, first.shape[1], difference, p_value)


def _discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    if len(first) != len(second):
        raise ConfigError(f"a paired test needs the same samples, got {len(first)} and {len(second)} marks")
    only_first = sum(1 for a, b in zip(first, second, strict=True) if a and not b)
    only_second = sum(1 for a, b in zip(first, second, strict=True) if b and not a)
    return only_first, only_second
