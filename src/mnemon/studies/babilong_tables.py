"""BABILong answers of several models and training seeds as rows, paired tests and tables.

The same questions are put to every model and to every seed of it. Accuracies of one seed have Wilson intervals and
McNemar tests; with several seeds both cover seeds and questions (crossed bootstrap).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from mnemon.errors import ConfigError
from mnemon.evaluation.compare.published import rows_at
from mnemon.evaluation.comparison import check_same_samples
from mnemon.evaluation.paired import SIGNIFICANCE, compare_scores, mean_interval
from mnemon.evaluation.results import BabilongResult
from mnemon.evaluation.samples import parse_length
from mnemon.evaluation.tables import Grid, p_text
from mnemon.metrics.intervals import within
from mnemon.studies.comparisons import add_corrected
from mnemon.studies.study import Json, points_text

Marks = NDArray[np.float64]
"""Right (1) or wrong (0) per training seed and question, [S, N]."""


class Answers:
    """The marks of every model at every length it was asked at.

    Args:
        by_seed: per training seed the results of all models, those of one range of lengths together: a model that was
            not asked at long lengths has no result there.

    Raises:
        ConfigError: models of one range were asked different questions, or seeds have different models.
    """

    def __init__(self, by_seed: Sequence[Sequence[Sequence[BabilongResult]]]) -> None:
        for seed in by_seed:
            for results in seed:
                check_same_samples(results)
        self._by_seed = [
            {(result.label, length): result for results in seed for result in results for length in _lengths(result)}
            for seed in by_seed
        ]
        first = self._by_seed[0]
        if any(set(other) != set(first) for other in self._by_seed[1:]):
            raise ConfigError("the seeds have different models or lengths; run the study again with the same --only")
        self.labels = tuple(dict.fromkeys(label for label, _ in first))
        self.lengths = tuple(dict.fromkeys(length for _, length in first))
        result = next(iter(first.values()))
        self.tasks = result.settings.tasks

    def asked(self, label: str, length: str) -> bool:
        """Say whether a model was asked at a length."""
        return (label, length) in self._by_seed[0]

    def marks(self, label: str, length: str, task: str | None = None) -> Marks:
        """Give the marks of one task, or of all tasks after each other."""
        tasks = None if task is None else (task,)
        rows = [seed[label, length] for seed in self._by_seed]
        return np.array([row.marks(length, row.settings.rule, tasks) for row in rows], dtype=np.float64)

    def result(self, label: str) -> BabilongResult:
        """Give one of the results of a model, for what is the same in all of them."""
        return next(result for (name, _), result in self._by_seed[0].items() if name == label)


def model_rows(answers: Answers) -> list[Json]:
    """Return label, size and accuracies of every model: per length, the samples, per task and their mean."""
    rows = []
    for label in answers.labels:
        model = answers.result(label).model
        cells = {
            length: {
                "samples": answers.marks(label, length, answers.tasks[0]).shape[1],
                "tasks": {task: asdict(mean_interval(answers.marks(label, length, task))) for task in answers.tasks},
                "mean": asdict(mean_interval(answers.marks(label, length))),
            }
            for length in answers.lengths
            if answers.asked(label, length)
        }
        facts = {"role": model.role, "parameters": model.num_parameters, "memory": model.num_memory_parameters}
        rows.append({"label": label, **facts, "training": model.training, "cells": cells})
    return rows


def compare_with(answers: Answers, label: str) -> list[Json]:
    """Compare one model with every other at every length where both were asked, all tasks together; Holm over all."""
    found: list[Json] = []
    for length in answers.lengths:
        for other in answers.labels:
            if other == label or not (answers.asked(label, length) and answers.asked(other, length)):
                continue
            ours, theirs = answers.marks(label, length), answers.marks(other, length)
            found.append({"length": length, "against": other, **paired(ours, theirs)})
    add_corrected(found)
    return found


def compare_beyond(answers: Answers, trained: int, pairs: Sequence[tuple[str, str]]) -> list[Json]:
    """Compare pairs of models by their mean over all lengths beyond a trained one, every length weighing the same.

    Args:
        answers: of all models.
        trained: tokens of the longest training text.
        pairs: labels of the models, first minus second; pairs without a length at which both were asked are left out.

    Returns:
        One test per pair, Holm-corrected over all, with the two means and the lengths that both were asked at.
    """
    found: list[Json] = []
    for first, second in pairs:
        lengths = [
            length
            for length in answers.lengths
            if parse_length(length) > trained and answers.asked(first, length) and answers.asked(second, length)
        ]
        if lengths:
            ours, theirs = (_weighed(answers, label, lengths) for label in (first, second))
            means = [float(marks.mean()) for marks in (ours, theirs)]
            found.append({"first": first, "second": second, "lengths": lengths, "means": means, **paired(ours, theirs)})
    add_corrected(found)
    return found


def _weighed(answers: Answers, label: str, lengths: Sequence[str]) -> Marks:
    """Return marks at several lengths after each other, scaled so that their mean is the mean over the lengths."""
    parts = [answers.marks(label, length) for length in lengths]
    total = sum(part.shape[1] for part in parts)
    return np.concatenate([part * (total / (len(parts) * part.shape[1])) for part in parts], axis=1)


def beyond_grid(tests: Sequence[Json]) -> Grid:
    """Return the table of `compare_beyond`; bold where the corrected p value is below 0.05."""
    lines = []
    for test in tests:
        lengths = test["lengths"]
        span = lengths[0] if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        means = (f"{100 * mean:.0f}" for mean in test["means"])
        lines.append((span, f"{test['first']} − {test['second']}", *means, *texts_of(test)))
    return Grid(("lengths", "models", "first", "second", "difference", "by seed", "p (Holm)"), tuple(lines))


def accuracy_grid(rows: Sequence[Json], tasks: Sequence[str], *, with_published: bool) -> Grid:
    """Return the table: length x model x task, published models in italics below the measured ones of a length."""
    lines = []
    for length in dict.fromkeys(length for row in rows for length in row["cells"]):
        measured = [(row["label"], row["cells"][length]) for row in rows if length in row["cells"]]
        for label, cell in measured:
            texts = [_percent(cell["tasks"][task]) for task in tasks]
            lines.append((f"{length} ({cell['samples']})", label, *texts, _percent(cell["mean"])))
        if with_published:
            lines += list(_published_lines(length, tasks))
    return Grid(("length (samples)", "model", *tasks, "mean"), tuple(lines))


def mean_grid(rows: Sequence[Json], lengths: Sequence[str]) -> Grid:
    """Return the table: model x length, means over the tasks."""
    lines = []
    for row in rows:
        cells = (_percent(row["cells"][length]["mean"]) if length in row["cells"] else "–" for length in lengths)
        lines.append((row["label"], row["role"], *cells))
    return Grid(("model", "role", *lengths), tuple(lines))


def difference_grid(tests: Sequence[Json], label: str) -> Grid:
    """Return the table of `compare_with`; bold where the corrected p value is below 0.05."""
    lines = []
    for test in tests:
        lines.append((test["length"], f"{label} − {test['against']}", *texts_of(test)))
    return Grid(("length", "models", "difference", "by seed", "p (Holm)"), tuple(lines))


def texts_of(test: Json) -> tuple[str, str, str]:
    """Write a test out: difference with interval, by seed, p value (bold where the corrected one is below 0.05)."""
    seeds = " ".join(f"{100 * value:+.1f}" for value in test["by_seed"])
    p_value = p_text(test["corrected_p"])
    marked = f"**{p_value}**" if test["corrected_p"] < SIGNIFICANCE else p_value
    return points_text(test), seeds, marked


def verdicts(tests: Sequence[Json], label: str) -> Iterator[str]:
    """Go through one sentence per other model: at which lengths the difference is more than luck."""
    for other in dict.fromkeys(test["against"] for test in tests):
        own = [test for test in tests if test["against"] == other]
        sure = [test for test in own if test["corrected_p"] < SIGNIFICANCE]
        better = [test["length"] for test in sure if test["difference"]["mean"] > 0]
        worse = [test["length"] for test in sure if test["difference"]["mean"] < 0]
        open_ = [test["length"] for test in own if test["corrected_p"] >= SIGNIFICANCE]
        parts = [
            f"{word} at {', '.join(lengths)}"
            for word, lengths in (("better", better), ("worse", worse), ("cannot be told apart", open_))
            if lengths
        ]
        yield f"- {label} against {other}: {'; '.join(parts)}."


def _lengths(result: BabilongResult) -> tuple[str, ...]:
    return result.settings.lengths


def paired(ours: Marks, theirs: Marks) -> Json:
    """Return difference, its value per training seed and the p value of two models on the same questions."""
    test = compare_scores(ours, theirs)
    by_seed = (ours - theirs).mean(axis=1).tolist()
    return {"difference": asdict(within(test.difference, -1.0, 1.0)), "by_seed": by_seed, "p_value": test.p_value}


def _published_lines(length: str, tasks: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for row in rows_at(length, tasks):
        texts = [f"{row.accuracies[task]:g}" if task in row.accuracies else "–" for task in tasks]
        mean = row.mean(tasks)
        yield (length, f"*{row.model}, published*", *texts, "–" if mean is None else f"{mean:.0f}")


def _percent(interval: Mapping[str, float]) -> str:
    low, mean, high = (f"{100 * interval[end]:.0f}" for end in ("low", "mean", "high"))
    return f"{mean} [{low}–{high}]"
