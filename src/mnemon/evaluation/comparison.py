"""Several models on the same BABILong samples: paired tests of every pair, corrected together.

A comparison refuses results whose samples differ: a difference between models would then partly be one between
samples. Two families of tests are made, and corrected each for itself: per length over all tasks together, and per
single cell. Results of one label and several training seeds are one model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mnemon.errors import ConfigError
from mnemon.evaluation.controls import control_notes
from mnemon.evaluation.paired import SIGNIFICANCE, ColumnTest, PairedScores, Scores, mean_interval
from mnemon.evaluation.results import BabilongResult, EvaluationSettings, Rule
from mnemon.evaluation.scoring import MAJORITY_LEVEL
from mnemon.evaluation.statistics import Correction, PairedTest
from mnemon.metrics.intervals import Interval, wilson_interval

__all__ = ["SIGNIFICANCE", "Best", "Comparison", "PairwiseTest", "check_same_samples"]

Place = tuple[str | None, str | None]
"""A length, None for all of them with equal weights, and a task, None for all of them together."""


@dataclass(frozen=True)
class PairwiseTest:
    """Two models at one length (None: all together), on one task or (task None) on all tasks together.

    Attributes:
        corrected_p: p value after the correction for all tests of the same family.
    """

    length: str | None
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
        results: one per model, labels all different, the same settings and samples; a label may stand there several
            times for different training seeds.
        rule: "exact" or "official"; None takes the settings' own.
        correction: for the number of tests: "holm" or "bh".
        baseline: test every model against this one only; None tests every pair.
        over_lengths: also estimate and test all lengths together, each with the same weight.

    Raises:
        ConfigError: if there is no result, a label occurs twice, settings or samples differ, or the baseline is no
            label.
    """

    def __init__(
        self,
        results: Sequence[BabilongResult],
        rule: Rule | None = None,
        *,
        correction: Correction = "holm",
        baseline: str | None = None,
        over_lengths: bool = False,
    ) -> None:
        check_same_samples(results)
        self.results = tuple(results)
        self.settings: EvaluationSettings = results[0].settings
        self.rule: Rule = rule or self.settings.rule
        self.correction, self.baseline, self.over_lengths = correction, baseline, over_lengths
        self._members: dict[str, list[BabilongResult]] = {}
        for result in results:
            self._members.setdefault(result.label, []).append(result)
        tasks = self.settings.tasks
        families: list[list[Place]] = [
            [(length, None) for length in self.lengths],
            [(length, task) for task in tasks for length in self.lengths],
        ]
        scores = {
            label: {place: self._scores(label, *place) for family in families for place in family}
            for label in self._members
        }
        self._paired = PairedScores(scores, families, correction=correction, baseline=baseline)
        self.tests = tuple(_place_test(test) for test in self._paired.tests)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the models, in the order given."""
        return tuple(self._members)

    @property
    def names(self) -> tuple[str, ...]:
        """A name per result: its label, with the training seed where a model has several."""
        return tuple(
            f"{result.label} (seed {result.model.training['seed']})"
            if self.num_seeds(result.label) > 1
            else result.label
            for result in self.results
        )

    @property
    def lengths(self) -> tuple[str | None, ...]:
        """Lengths of the table; None for all of them together stands last, if it was asked for."""
        return (*self.settings.lengths, *([None] if self.over_lengths else []))

    @property
    def num_samples_evaluated(self) -> int:
        """Samples that every model answered, all tasks and lengths together."""
        return sum(len(cell.predictions) for cell in self.results[0].cells)

    def num_seeds(self, label: str) -> int:
        """Give the number of training seeds of a model."""
        return len(self._members[label])

    def accuracy(self, label: str, length: str | None, task: str | None = None) -> Interval:
        """Give a model's accuracy with its 95 % interval; over all tasks together if `task` is None."""
        return self._paired.estimate(label, (length, task))

    def spread(self, label: str, length: str | None, task: str | None = None) -> float | None:
        """Give the standard deviation of a model's accuracy over its training seeds; None with one seed."""
        return self._paired.spread(label, (length, task))

    def group_accuracy(self, label: str, tasks: Sequence[str]) -> Interval:
        """Give a model's accuracy on some tasks over every length together, all lengths weighing the same.

        Where lengths have different numbers of samples the interval is that of as many samples as would give the same
        uncertainty.
        """
        if self.num_seeds(label) > 1:
            return mean_interval(self._scores(label, None, *tasks))
        result = self._members[label][0]
        marks = [result.marks(length, self.rule, tuple(tasks)) for length in self.settings.lengths]
        mean = sum(sum(row) / len(row) for row in marks) / len(marks)
        effective = round(len(marks) ** 2 / sum(1 / len(row) for row in marks))
        interval = wilson_interval(round(mean * effective), effective)
        return Interval(mean, min(mean, interval.low), max(mean, interval.high))

    def test(self, first: str, second: str, length: str | None, task: str | None = None) -> PairwiseTest:
        """Give the paired test of two models; the difference in it is that of the pair's own order."""
        return _place_test(self._paired.test(first, second, (length, task)))

    def best(self, length: str | None, task: str | None = None) -> Best | None:
        """Give the most accurate model of a row, or None if several share that accuracy or there is only one."""
        leader = self._paired.leader((length, task))
        return None if leader is None else Best(leader, leader in self.stars(length, task))

    def stars(self, length: str | None, task: str | None = None) -> frozenset[str]:
        """Give the models that are significantly better: than every other one, or than the baseline if there is one."""
        return self._paired.stars((length, task))

    def majority_level(self) -> float | None:
        """Give the accuracy of always answering each task's most frequent answer; None if a task's is not known."""
        levels = [MAJORITY_LEVEL.get(task) for task in self.settings.tasks]
        known = [level for level in levels if level is not None]
        return sum(known) / len(known) if len(known) == len(levels) else None

    def notes(self) -> list[str]:
        """Say which controls stand in the comparison, which are missing, and what is not equal."""
        return control_notes([(label, members[0].model) for label, members in self._members.items()])

    def _scores(self, label: str, length: str | None, *tasks: str | None) -> Scores:
        """Give marks as numbers, [seeds, samples]; over all lengths each is weighted so that lengths weigh the same."""
        chosen = None if tasks == (None,) else tuple(task for task in tasks if task is not None)
        lengths = self.settings.lengths if length is None else (length,)
        blocks = [
            np.array([result.marks(name, self.rule, chosen) for result in self._members[label]], dtype=np.float64)
            for name in lengths
        ]
        sizes = [block.shape[1] for block in blocks]
        if len(set(sizes)) > 1:
            total = sum(sizes)
            blocks = [block * (total / (len(blocks) * size)) for block, size in zip(blocks, sizes, strict=True)]
        return np.concatenate(blocks, axis=1)


def check_same_samples(results: Sequence[BabilongResult]) -> None:
    """Refuse to compare what was not measured on the same samples.

    Raises:
        ConfigError: if there is no result, a label occurs twice (but for different training seeds), or settings or
            samples differ; the first difference is named.
    """
    if not results:
        raise ConfigError("a comparison needs at least one result, got none")
    keys = [(result.label, result.model.training.get("seed")) for result in results]
    several = len({label for label, _ in keys}) < len(keys)
    if several and (len(set(keys)) < len(keys) or _has_unknown_seed(keys)):
        listing = ", ".join(result.label for result in results)
        raise ConfigError(f"every model needs a label of its own, got {listing}; write LABEL=MODEL")
    first = results[0]
    for other in results[1:]:
        pair = f"{first.label!r} and {other.label!r}"
        if other.settings != first.settings:
            name = next(k for k, v in vars(first.settings).items() if v != getattr(other.settings, k))
            old, new = getattr(first.settings, name), getattr(other.settings, name)
            raise ConfigError(
                f"{pair} cannot be compared: {name} is {_shown(old)} and {_shown(new)}; evaluate both alike"
            )
        if place := _first_difference(first, other):
            raise ConfigError(
                f"{pair} cannot be compared: their samples differ ({place}); evaluate both with one command"
            )


def _has_unknown_seed(keys: Iterable[tuple[str, object]]) -> bool:
    """Tell whether a label that stands there several times has a result whose training seed is not known."""
    known = list(keys)
    labels = [label for label, _ in known]
    return any(seed is None and labels.count(label) > 1 for label, seed in known)


def _first_difference(first: BabilongResult, other: BabilongResult) -> str:
    """Say which sample is the first that two results do not share; empty if there is none."""
    for task in first.settings.tasks:
        for length in first.settings.lengths:
            pairs = [result.cell(task, length).predictions for result in (first, other)]
            if len(pairs[0]) != len(pairs[1]):
                return f"{task} at {length}: {len(pairs[0])} and {len(pairs[1])}"
            for left, right in zip(*pairs, strict=True):
                if (left.sample_id, left.sample_sha256) != (right.sample_id, right.sample_sha256):
                    return f"{task} at {length}: {left.sample_id} is another text or question"
    return ""


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else repr(value)


def _place_test(test: ColumnTest[Place]) -> PairwiseTest:
    return PairwiseTest(*test.column, test.first, test.second, test.result, test.corrected_p)
