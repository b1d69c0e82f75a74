"""Per-sample scores of one suite as a table with paired tests, whatever the suite measures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mnemon.errors import ConfigError
from mnemon.evaluation.paired import PairedScores, Scores
from mnemon.evaluation.sample_scores import SampleScore
from mnemon.evaluation.statistics import CORRECTIONS, Correction
from mnemon.evaluation.tables import Grid, p_text, strong
from mnemon.metrics.intervals import Interval

_MOST_COLUMNS = 10
_PERPLEXITIES = ("nats_per_token", "perplexity")


@dataclass(frozen=True)
class SuiteScores:
    """What one model, one training seed, made of a suite.

    Attributes:
        samples: its samples, any tasks.
    """

    label: str
    samples: tuple[SampleScore, ...]


class SuiteComparison:
    """Several models on the same samples of one suite.

    Args:
        suite: its name.
        members: a model per label; a label may stand there several times for different training seeds.
        tasks: use these only; None uses all.
        correction: for the number of tests.
        baseline: test against this label only.

    Raises:
        ConfigError: if models were measured on other tasks or samples; the first difference is named.
    """

    def __init__(
        self,
        suite: str,
        members: Sequence[SuiteScores],
        *,
        tasks: Sequence[str] | None = None,
        correction: Correction = "holm",
        baseline: str | None = None,
    ) -> None:
        cells = [_by_task(member, tasks) for member in members]
        _check_same(suite, members, cells)
        self.suite, self.correction = suite, correction
        self.tasks = tuple(cells[0])
        self.metrics = {task: next(iter(cell.values())).metric for task, cell in cells[0].items()}
        scores: dict[str, dict[str | None, Scores]] = {}
        for label in dict.fromkeys(member.label for member in members):
            own = [cell for member, cell in zip(members, cells, strict=True) if member.label == label]
            scores[label] = {task: _matrix(own, task, list(cells[0][task])) for task in self.tasks}
        self.has_mean = len(self.tasks) > 1 and len(set(self.metrics.values())) == 1 and not self.is_loss(self.tasks[0])
        if self.has_mean:
            for columns in scores.values():
                columns[None] = _weighted([columns[task] for task in self.tasks])
        families: list[list[str | None]] = [list(self.tasks), [None] if self.has_mean else []]
        in_unit = not any(map(self.is_loss, self.tasks))
        self.paired: PairedScores[str | None] = PairedScores(
            scores, families, correction=correction, baseline=baseline, in_unit=in_unit
        )

    @property
    def columns(self) -> tuple[str | None, ...]:
        """Tasks, and None for their mean where they can be averaged."""
        return (*self.tasks, *([None] if self.has_mean else []))

    def is_loss(self, task: str) -> bool:
        """Tell whether the scores of a task are losses with the sign turned."""
        metric = self.metrics[task]
        return metric.startswith("nats") or metric == "perplexity"

    def shown(self, label: str, column: str | None) -> Interval:
        """Give a number as people read it: percent, perplexity or nats (lower is better)."""
        return self._readable(self.paired.estimate(label, column), column)

    def unit(self, column: str | None) -> str:
        """Name what `shown` gives."""
        if column is None or not self.is_loss(column):
            return "%"
        return "perplexity" if self.metrics[column] in _PERPLEXITIES else "nats"

    def _readable(self, interval: Interval, column: str | None) -> Interval:
        if column is None or not self.is_loss(column):
            return Interval(100 * interval.mean, 100 * interval.low, 100 * interval.high)
        if self.metrics[column] in _PERPLEXITIES:
            return Interval(*(math.exp(min(700.0, -value)) for value in (interval.mean, interval.high, interval.low)))
        return Interval(-interval.mean, -interval.high, -interval.low)


def suite_grid(comparison: SuiteComparison) -> Grid:
    """Arrange models by tasks, or tasks by models where there are many tasks."""
    columns, labels = comparison.columns, comparison.paired.labels
    leaders = {column: comparison.paired.leader(column) for column in columns}
    texts = {
        (label, column): _cell(comparison, label, column, leaders[column]) for label in labels for column in columns
    }
    heads = {column: _head(comparison, column) for column in columns}
    if len(columns) <= _MOST_COLUMNS:
        lines = [(label, *(texts[label, column] for column in columns)) for label in labels]
        return Grid(("model", *heads.values()), tuple(lines), num_names=1)
    lines = [(heads[column], *(texts[label, column] for label in labels)) for column in columns]
    return Grid(("task", *labels), tuple(lines), num_names=1)


def suite_tests(comparison: SuiteComparison, *, averages_only: bool = False) -> Grid:
    """Arrange the paired tests, one line per column and pair; a positive difference means that the first is better.

    Args:
        comparison: the models.
        averages_only: leave out single tasks where there is a mean over them.
    """
    lines = []
    columns = (None,) if averages_only and comparison.has_mean else (*reversed(comparison.columns),)
    for column in columns:
        for test in (test for test in comparison.paired.tests if test.column == column):
            is_percent = column is None or not comparison.is_loss(column)
            scale, digits, unit = (100, 1, "points") if is_percent else (1, 3, "nats")
            change = test.result.difference
            low, mean, high = (f"{scale * value:+.{digits}f}" for value in (change.low, change.mean, change.high))
            corrected = p_text(test.corrected_p)
            lines.append(
                (
                    "mean" if column is None else column,
                    f"{test.first} − {test.second}",
                    f"{mean} [{low}, {high}] {unit}",
                    p_text(test.result.p_value),
                    strong(corrected) if test.corrected_p < 0.05 else corrected,
                )
            )
    return Grid(("task", "models", "difference", "p", f"p ({CORRECTIONS[comparison.correction]})"), tuple(lines))


def suite_caption(comparison: SuiteComparison) -> str:
    """Say how to read the table."""
    counts = sorted({comparison.paired.num_samples(task) for task in comparison.tasks})
    number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,}–{counts[-1]:,}"
    seeds = {label: comparison.paired.num_seeds(label) for label in comparison.paired.labels}
    text = f"{number} samples per task, the same for every model; 95 % intervals in brackets."
    if max(seeds.values()) > 1:
        listing = ", ".join(f"{label} {count}" for label, count in seeds.items())
        text += f" Training seeds: {listing}; their intervals cover seeds and samples, ± is the spread over seeds."
    if len(seeds) > 1:
        baseline = comparison.paired.baseline
        rival = "every other model" if baseline is None else f"the baseline {baseline}"
        text += f" Bold: best. ★: better than {rival} ({CORRECTIONS[comparison.correction]}-corrected p < 0.05)."
    if any(map(comparison.is_loss, comparison.tasks)):
        text += " Perplexities and nats: lower is better; differences are in nats, positive where the first is better."
    return text


def _head(comparison: SuiteComparison, column: str | None) -> str:
    name = "mean" if column is None else column
    unit = comparison.unit(column)
    return name if unit == "%" else f"{name} ({unit})"


def _cell(comparison: SuiteComparison, label: str, column: str | None, leader: str | None) -> str:
    value = comparison.shown(label, column)
    digits = 1 if comparison.unit(column) == "%" else 2 if comparison.unit(column) == "perplexity" else 3
    spread = comparison.paired.spread(label, column)
    text = f"{value.mean:.{digits}f}"
    if spread is not None:
        if comparison.unit(column) == "perplexity":
            spread *= value.mean  # first order: the spread of a logarithm
        text += f"±{(100 if comparison.unit(column) == '%' else 1) * spread:.{digits}f}"
    text += "★" if label in comparison.paired.stars(column) else ""
    text += f" [{value.low:.{digits}f}–{value.high:.{digits}f}]"
    return strong(text) if label == leader else text


Cells = dict[str, dict[str, SampleScore]]


def _by_task(member: SuiteScores, tasks: Sequence[str] | None) -> Cells:
    cells: Cells = {}
    for sample in member.samples:
        if tasks is None or sample.task in tasks:
            cells.setdefault(sample.task, {})[sample.id] = sample
    return cells


def _check_same(suite: str, members: Sequence[SuiteScores], cells: Sequence[Cells]) -> None:
    first = cells[0]
    if not first:
        raise ConfigError(f"{suite}: {members[0].label} holds none of the tasks asked for")
    for member, cell in zip(members[1:], cells[1:], strict=True):
        pair = f"{suite}: {members[0].label!r} and {member.label!r} cannot be compared"
        if odd := sorted(set(first) ^ set(cell)):
            raise ConfigError(f"{pair}: only one has the task {odd[0]}; evaluate both alike or choose with --tasks")
        for task, samples in first.items():
            if len(samples) != len(cell[task]):
                raise ConfigError(
                    f"{pair}: {task} has {len(samples)} and {len(cell[task])} samples; evaluate both alike"
                )
            for name, sample in samples.items():
                other = cell[task].get(name)
                if other is None or (sample.sample_sha256 != other.sample_sha256 and other.sample_sha256):
                    raise ConfigError(
                        f"{pair}: their samples of {task} differ (first {name}: another seed, text or tokenizer); "
                        "evaluate both alike"
                    )


def _matrix(cells: Sequence[Cells], task: str, ids: Sequence[str]) -> Scores:
    return np.array([[cell[task][name].score for name in ids] for cell in cells], dtype=np.float64)


def _weighted(blocks: Sequence[Scores]) -> Scores:
    """Put columns side by side so that each weighs the same in the mean, whatever its number of samples."""
    total = sum(block.shape[1] for block in blocks)
    if len({block.shape[1] for block in blocks}) == 1:
        return np.concatenate(blocks, axis=1)
    return np.concatenate([block * (total / (len(blocks) * block.shape[1])) for block in blocks], axis=1)


def by_model(samples: Sequence[SampleScore]) -> Mapping[tuple[str, str], tuple[SampleScore, ...]]:
    """Sort samples by suite and model."""
    sorted_samples: dict[tuple[str, str], list[SampleScore]] = {}
    for sample in samples:
        sorted_samples.setdefault((sample.suite, sample.model), []).append(sample)
    return {key: tuple(values) for key, values in sorted_samples.items()}
