"""What a harness suite leaves behind: rows of numbers and a line per sample, to JSON and back.

    {"model": "LM2", "suite": "recall", "task": "fda", "id": "fda-00007", "score": 1.0, ...}

Nothing here computes on models; the runner fills these records, tables and comparisons read them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mnemon.errors import DataError
from mnemon.evaluation.sample_scores import ADVICE, SAMPLES, SampleScore, read_samples
from mnemon.files import parse_object, read_text
from mnemon.metrics.intervals import bootstrap_mean, bootstrap_ratio, wilson_interval

FORMAT = "mnemon-harness-1"
RESULTS, TABLE, CELLS = "results.json", "table.md", "cells"


@dataclass(frozen=True)
class HarnessSample(SampleScore):
    """What one model made of one sample; the score is the number that the task counts first.

    Attributes:
        values: every number of the sample, by metric; perplexities keep their log-likelihood, and the words it is of.
        output: what was generated, or None.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    output: str | None = None


@dataclass(frozen=True)
class Row:
    """One number of one model on one task, and how sure it is.

    Attributes:
        value: share in 0..1, or perplexity.
        low: lower end of the 95 % interval: Wilson for right or wrong, bootstrap over samples otherwise; None for a
            single sample.
        stderr: standard error of the mean, where the number is one; None otherwise.
        counts_first: whether this is the task's main number.
        num_samples: samples measured.
        num_dropped: documents that the protocol does not measure.
        num_cut: documents whose text was cut around the answer.
        num_not_found: of these, documents that do not hold their answer literally.
        num_truncated: requests that lost their beginning because the context was full.
        num_fewshot: examples before every question.
        version: version of the task's definition.
        seconds: time of the whole task; forward_seconds of it were spent in the model.
    """

    model: str
    task: str
    metric: str
    kind: str
    value: float
    low: float | None
    high: float | None
    stderr: float | None
    counts_first: bool
    num_samples: int
    num_dropped: int
    num_cut: int
    num_not_found: int
    num_truncated: int
    num_fewshot: int
    version: str
    seconds: float
    forward_seconds: float


@dataclass(frozen=True)
class HarnessRun:
    """Everything a table of one suite says.

    Attributes:
        models: facts about every model, by label: source, weights, parameters, training.
        left_out: tasks that were not measured, and why.
    """

    suite: str
    settings: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...]
    samples: tuple[HarnessSample, ...]
    command: str
    machine: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def value(self) -> dict[str, Any]:
        """Return the content of `results.json`: everything but the single samples."""
        value = {"format": FORMAT, **asdict(self)}
        del value["samples"]
        return value

    def row(self, model: str, task: str, metric: str | None = None) -> Row | None:
        """Give the row of a model and task, the main one without a metric; None if it was not measured."""
        for row in self.rows:
            if (row.model, row.task) == (model, task) and (
                row.counts_first if metric is None else row.metric == metric
            ):
                return row
        return None


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95 % interval and its standard error, as far as they are defined."""

    value: float
    low: float | None = None
    high: float | None = None
    stderr: float | None = None


def estimate(kind: str, values: Sequence[Sequence[float]]) -> Estimate:
    """Average the numbers of a task's samples.

    Args:
        kind: `accuracy` (each 1 or 0), `score` (each in 0..1), `perplexity` (each a log-likelihood; exp of minus the
            mean) or `word_perplexity` (each a log-likelihood and its words; exp of minus the ratio of the sums).
        values: the numbers of every sample, at least one sample.
    """
    first = np.array([value[0] for value in values], dtype=np.float64)
    count = len(first)
    stderr = float(first.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    if kind == "accuracy":
        share = wilson_interval(float(first.sum()), count)
        return Estimate(share.mean, share.low, share.high, stderr)
    if kind == "score":
        if count < 2:
            return Estimate(float(first[0]))
        mean = bootstrap_mean(first)
        return Estimate(mean.mean, mean.low, mean.high, stderr)
    words = np.array([value[1] for value in values], dtype=np.float64) if kind == "word_perplexity" else np.ones(count)
    if count < 2:
        return Estimate(_exp(float(-first[0] / words[0])))
    loss = bootstrap_ratio(-first, words)
    return Estimate(_exp(loss.mean), _exp(loss.low), _exp(loss.high))


def _exp(loss: float) -> float:
    """Give the perplexity of a loss, kept finite so that it can be written as JSON."""
    return math.exp(min(loss, 700.0))


def read_run(folder: Path) -> HarnessRun:
    """Read a finished run of a suite back.

    Raises:
        DataError: a file is missing, damaged or of another format, or the samples do not fit the results.
    """
    path = folder / RESULTS
    value = parse_object(read_text(path), str(path), ADVICE)
    if value.pop("format", None) != FORMAT:
        raise DataError(f"{path}: expected a file of the format {FORMAT!r}; give the folder of a suite's run")
    try:
        rows = tuple(Row(**row) for row in value.pop("rows"))
        run = HarnessRun(rows=rows, samples=read_samples(folder / SAMPLES, sample_from_dict), **value)
    except (TypeError, KeyError) as error:
        raise DataError(f"{path}: a field is missing or unknown ({error}); evaluate again") from None
    for row in run.rows:
        held = sum(1 for sample in run.samples if (sample.model, sample.task) == (row.model, row.task))
        if held != row.num_samples:
            raise DataError(
                f"{folder / SAMPLES}: expected {row.num_samples} samples of {row.model} on {row.task}, got {held}; "
                "evaluate again"
            )
    return run


def sample_from_dict(value: Mapping[str, Any], where: str) -> HarnessSample:
    """Build a sample from parsed JSON; DataError that says where if a field is missing, unknown or no number."""
    known = {item.name for item in fields(HarnessSample)}
    if unknown := sorted(set(value) - known):
        raise DataError(f"{where}: unknown field {unknown[0]!r}")
    score = value.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise DataError(f"{where}: expected a number under 'score', got {score!r}")
    try:
        return HarnessSample(**value)
    except TypeError as error:
        raise DataError(f"{where}: a field is missing ({error})") from None
