"""Several models on the same samples: paired tests of every pair, corrected together.

A comparison refuses results whose samples differ: a difference between models would then partly be one between
samples. Two families of tests are made, and Holm-corrected each for itself: per length over all tasks together, and per
single cell.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mnemon.errors import ConfigError
from mnemon.evaluation.controls import control_notes
from mnemon.evaluation.results import BabilongResult, EvaluationSettings, Rule
from mnemon.evaluation.scoring import MAJORITY_LEVEL
from mnemon.evaluation.statistics import PairedTest, holm, paired_test
from mnemon.metrics.intervals import Interval, wilson_interval

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class PairwiseTest:
    """Two models at one length, on one task or (task None) on all tasks together.

    Attributes:
        corrected_p: p value after Holm's correction for all tests of the same family.
    """

    length: str
    task: str | None
    first: str
    second: str
    result: PairedTest
    corrected_p: float


@dataclass(frozen=True)
class Best:
    """The most accurate model of a row; `significant` if it beats every other one by the corrected paired test."""

    label: str
    significant: bool


class Comparison:
    """Results of one or more models on the same samples, with every paired test.

    Args:
        results: one per model, labels all different, the same settings and samples.
        rule: "exact" or "official"; None takes the settings' own.

    Raises:
        ConfigError: if there is no result, a label occurs twice, or settings or samples differ.
    """

    def __init__(self, results: Sequence[BabilongResult], rule: Rule | None = None) -> None:
        check_same_samples(results)
        self.results = tuple(results)
        self.settings: EvaluationSettings = results[0].settings
        self.rule: Rule = rule or self.settings.rule
        self._by_label = {result.label: result for result in results}
        per_length = self._tests(None)
        per_cell = [test for task in self.settings.tasks for test in self._tests(task)]
        self.tests: tuple[PairwiseTest, ...] = (*_corrected(per_length), *_corrected(per_cell))
        self._index = {(test.length, test.task, frozenset((test.first, test.second))): test for test in self.tests}

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the models, in the order given."""
        return tuple(self._by_label)

    @property
    def num_samples_evaluated(self) -> int:
        """Samples that every model answered, all tasks and lengths together."""
        return sum(len(cell.predictions) for cell in self.results[0].cells)

    def accuracy(self, label: str, length: str, task: str | None = None) -> Interval:
        """Give a model's accuracy with its 95 % interval; over all tasks together if `task` is None."""
        marks = self._marks(label, length, task)
        return wilson_interval(sum(marks), len(marks))

    def group_accuracy(self, label: str, tasks: Sequence[str]) -> Interval:
        """Give a model's accuracy on some tasks over every length together, all lengths weighing the same.

        Where lengths have different numbers of samples the interval is that of as many samples as would give the same
        uncertainty.
        """
        result = self._by_label[label]
        marks = [result.marks(length, self.rule, tuple(tasks)) for length in self.settings.lengths]
        mean = sum(sum(row) / len(row) for row in marks) / len(marks)
        effective = round(len(marks) ** 2 / sum(1 / len(row) for row in marks))
        interval = wilson_interval(round(mean * effective), effective)
        return Interval(mean, min(mean, interval.low), max(mean, interval.high))

    def test(self, first: str, second: str, length: str, task: str | None = None) -> PairwiseTest:
        """Give the paired test of two models; the difference in it is that of the pair's own order."""
        return self._index[length, task, frozenset((first, second))]

    def best(self, length: str, task: str | None = None) -> Best | None:
        """Give the most accurate model of a row, or None if several share that accuracy or there is only one."""
        means = {label: self.accuracy(label, length, task).mean for label in self.labels}
        top = max(means.values())
        leaders = [label for label, mean in means.items() if mean == top]
        if len(means) < 2 or len(leaders) > 1:
            return None
        others = [self.test(leaders[0], other, length, task) for other in self.labels if other != leaders[0]]
        return Best(leaders[0], all(test.corrected_p < SIGNIFICANCE for test in others))

    def majority_level(self) -> float | None:
        """Give the accuracy of always answering each task's most frequent answer; None if a task's is not known."""
        levels = [MAJORITY_LEVEL.get(task) for task in self.settings.tasks]
        known = [level for level in levels if level is not None]
        return sum(known) / len(known) if len(known) == len(levels) else None

    def notes(self) -> list[str]:
        """Say which controls stand in the comparison, which are missing, and what is not equal."""
        return control_notes([(result.label, result.model) for result in self.results])

    def _marks(self, label: str, length: str, task: str | None) -> list[bool]:
        return self._by_label[label].marks(length, self.rule, None if task is None else (task,))

    def _tests(self, task: str | None) -> list[PairwiseTest]:
        tests = []
        for length in self.settings.lengths:
            for first, second in itertools.combinations(self.labels, 2):
                result = paired_test(self._marks(first, length, task), self._marks(second, length, task))
                tests.append(PairwiseTest(length, task, first, second, result, result.p_value))
        return tests


def check_same_samples(results: Sequence[BabilongResult]) -> None:
    """Refuse to compare what was not measured on the same samples.

    Raises:
        ConfigError: if there is no result, a label occurs twice, or settings or samples differ.
    """
    if not results:
        raise ConfigError("a comparison needs at least one result, got none")
    labels = [result.label for result in results]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"every model needs a label of its own, got {', '.join(labels)}; write LABEL=MODEL")
    first = results[0]
    for other in results[1:]:
        pair = f"{first.label!r} and {other.label!r}"
        if other.settings != first.settings:
            name = next(k for k, v in vars(first.settings).items() if v != getattr(other.settings, k))
            old, new = getattr(first.settings, name), getattr(other.settings, name)
            raise ConfigError(f"{pair} cannot be compared: {name} is {old!r} and {new!r}; evaluate both alike")
        if _identities(first) != _identities(other):
            raise ConfigError(f"{pair} cannot be compared: their samples differ; evaluate both with one command")


def _identities(result: BabilongResult) -> list[tuple[str, str]]:
    return [(prediction.sample_id, prediction.sample_sha256) for prediction in result.predictions()]


def _corrected(tests: list[PairwiseTest]) -> list[PairwiseTest]:
    corrected = holm([test.result.p_value for test in tests])
    return [
        PairwiseTest(t.length, t.task, t.first, t.second, t.result, p) for t, p in zip(tests, corrected, strict=True)
    ]
