"""Scores of several models on the same samples: an interval for every number, and a paired test for every pair.

A column is whatever was measured on one set of samples: a task at a length, or several together. A model may have been
trained with several seeds; its scores in a column are then a row per seed. Nothing here knows where scores come from.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mnemon.errors import ConfigError
from mnemon.evaluation.statistics import Correction, PairedTest, correct, crossed_test, paired_test
from mnemon.metrics.intervals import Interval, crossed_bootstrap, wilson_interval, within

SIGNIFICANCE = 0.05

Column = TypeVar("Column", bound=Hashable)
Scores = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class ColumnTest(Generic[Column]):
    """Two models in one column.

    Attributes:
        corrected_p: p value after the correction for all tests of the same family.
    """

    column: Column
    first: str
    second: str
    result: PairedTest
    corrected_p: float


class PairedScores(Generic[Column]):
    """Scores by label and column, with every estimate and test; each is computed once.

    Args:
        scores: per label and column, [S, N]: a row per training seed, a score per sample, the higher the better; the
            same columns and samples for every label.
        families: columns whose tests are corrected together.
        correction: for the number of tests.
        baseline: test only against this label; None tests every pair.
        in_unit: whether scores lie in 0..1.

    Raises:
        ConfigError: if the baseline is no label, or columns differ in their number of samples.
    """

    def __init__(
        self,
        scores: Mapping[str, Mapping[Column, Scores]],
        families: Sequence[Sequence[Column]],
        *,
        correction: Correction = "holm",
        baseline: str | None = None,
        in_unit: bool = True,
    ) -> None:
        if baseline is not None and baseline not in scores:
            raise ConfigError(f"the baseline {baseline!r} is not among {', '.join(map(repr, scores))}")
        self._scores, self._in_unit = scores, in_unit
        self.labels = tuple(scores)
        self.baseline = baseline
        self._estimates: dict[tuple[str, Column], Interval] = {}
        tests: list[ColumnTest[Column]] = []
        for family in families:
            tests += _corrected(self._tests(family), correction)
        self.tests = tuple(tests)
        self._index = {(test.column, frozenset((test.first, test.second))): test for test in tests}

    def num_seeds(self, label: str) -> int:
        """Give the number of training seeds of a model."""
        return max(len(scores) for scores in self._scores[label].values())

    def num_samples(self, column: Column) -> int:
        """Give the samples of a column."""
        return self._scores[self.labels[0]][column].shape[1]

    def estimate(self, label: str, column: Column) -> Interval:
        """Give a mean with its 95 % interval: Wilson's for marks of one seed, else over seeds and samples."""
        if (label, column) not in self._estimates:
            self._estimates[label, column] = mean_interval(self._scores[label][column], in_unit=self._in_unit)
        return self._estimates[label, column]

    def spread(self, label: str, column: Column) -> float | None:
        """Give the standard deviation of the mean over training seeds; None with one seed."""
        scores = self._scores[label][column]
        return float(scores.mean(axis=1).std(ddof=1)) if len(scores) > 1 else None

    def test(self, first: str, second: str, column: Column) -> ColumnTest[Column]:
        """Give the test of two models; the difference in it is that of the pair's own order."""
        return self._index[column, frozenset((first, second))]

    def leader(self, column: Column) -> str | None:
        """Give the model with the highest mean, or None if several share it or there is only one."""
        means = {label: self.estimate(label, column).mean for label in self.labels}
        top = max(means.values())
        leaders = [label for label, mean in means.items() if mean == top]
        return leaders[0] if len(leaders) == 1 < len(means) else None

    def stars(self, column: Column) -> frozenset[str]:
        """Give the models that are significantly better: than every other one, or than the baseline if there is one."""
        if self.baseline is None:
            leader = self.leader(column)
            candidates = [] if leader is None else [leader]
        else:
            candidates = [label for label in self.labels if label != self.baseline]
        return frozenset(label for label in candidates if self._beats_rivals(label, column))

    def _beats_rivals(self, label: str, column: Column) -> bool:
        rivals = [other for other in self.labels if other != label] if self.baseline is None else [self.baseline]
        mean = self.estimate(label, column).mean
        return all(
            mean > self.estimate(rival, column).mean and self.test(label, rival, column).corrected_p < SIGNIFICANCE
            for rival in rivals
        )

    def _pairs(self) -> list[tuple[str, str]]:
        if self.baseline is None:
            return list(itertools.combinations(self.labels, 2))
        return [(label, self.baseline) for label in self.labels if label != self.baseline]

    def _tests(self, family: Sequence[Column]) -> list[ColumnTest[Column]]:
        tests = []
        for column in family:
            for first, second in self._pairs():
                result = compare_scores(self._scores[first][column], self._scores[second][column])
                tests.append(ColumnTest(column, first, second, result, result.p_value))
        return tests


def compare_scores(first: Scores, second: Scores) -> PairedTest:
    """Compare two models on the same samples: exact McNemar where both have one seed and marks, else crossed bootstrap.

    Args:
        first: scores of the first model, [S1, N].
        second: scores of the second model, [S2, N].
    """
    if len(first) == len(second) == 1 and _are_marks(first) and _are_marks(second):
        return paired_test((first[0] == 1).tolist(), (second[0] == 1).tolist())
    return crossed_test(first, second)


def mean_interval(scores: Scores, *, in_unit: bool = True) -> Interval:
    """Give the mean of scores with its 95 % interval.

    Marks of one seed have Wilson's interval. Otherwise it is that of the crossed bootstrap; where all scores are equal,
    that would have no width, and scores in 0..1 get Wilson's of as many marks as there are samples.

    Args:
        scores: [S, N].
        in_unit: whether scores lie in 0..1; the interval then does, too.
    """
    samples = scores.shape[1]
    if len(scores) == 1 and _are_marks(scores):
        return wilson_interval(int(scores.sum()), samples)
    interval, _ = crossed_bootstrap(scores)
    if not in_unit:
        return interval
    if interval.low == interval.high:
        return wilson_interval(interval.mean * samples, samples)
    return within(interval, 0.0, 1.0)


def _are_marks(scores: Scores) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _corrected(tests: list[ColumnTest[Column]], method: Correction) -> list[ColumnTest[Column]]:
    corrected = correct([test.result.p_value for test in tests], method)
    return [
        ColumnTest(test.column, test.first, test.second, test.result, p)
        for test, p in zip(tests, corrected, strict=True)
    ]
