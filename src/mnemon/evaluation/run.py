"""A finished evaluation as a folder: written once everything is known, read back for reports and result pages.

results.json        settings, machine, command, accuracy and time of every cell, paired tests
predictions.jsonl   one line per answer of every model, and training seed where models have several
table.md            the tables
*.png, *.svg        the figures
report.html         all of it on one page that needs nothing else
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mnemon.errors import DataError
from mnemon.evaluation import tables
from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.diagnostics import MemoryReport, memory_grid, memory_notes, report_from_dict
from mnemon.evaluation.results import BabilongResult, parse_json, result_from_dict
from mnemon.evaluation.sample_scores import ADVICE
from mnemon.files import atomic_write_bytes, atomic_write_json, atomic_write_text, parse_object, read_text

FORMAT = "mnemon-evaluation-1"
_CELL_FACTS = ("task", "length", "seconds", "prompt_tokens", "new_tokens", "retrieval")
_Key = tuple[str, int | None, str, str]
RESULTS, PREDICTIONS, TABLE, REPORT = "results.json", "predictions.jsonl", "table.md", "report.html"


@dataclass(frozen=True)
class EvaluationRun:
    """Everything a report says.

    Attributes:
        results: one per model, on the same samples.
        command: the command line that made it.
        machine: processor, threads, versions.
        example_prompt: one short prompt as the models saw it.
        diagnostics: what the memories did, if it was asked for.
    """

    results: tuple[BabilongResult, ...]
    command: str
    machine: dict[str, str] = field(default_factory=dict)
    example_prompt: str = ""
    diagnostics: tuple[MemoryReport, ...] = ()

    @property
    def comparison(self) -> Comparison:
        """The results with their paired tests."""
        return Comparison(self.results)


def write_run(folder: Path, run: EvaluationRun) -> list[Path]:
    """Write every file of a run, each complete or not at all; `results.json` last, so that its presence means all.

    Args:
        folder: output folder, already prepared.
        run: what to write.

    Returns:
        The files written.

    Raises:
        RunError: if the disk is full or the place is not writable.
    """
    from mnemon.evaluation.plots import all_plots
    from mnemon.evaluation.report import html_report

    comparison = run.comparison
    plots = all_plots(comparison)
    written = [
        atomic_write_text(folder / PREDICTIONS, _prediction_lines(run)),
        atomic_write_text(folder / TABLE, markdown_page(run)),
        atomic_write_text(folder / REPORT, html_report(run, comparison, plots)),
    ]
    for plot in plots:
        written.append(atomic_write_bytes(folder / f"{plot.name}.png", plot.png))
        written.append(atomic_write_bytes(folder / f"{plot.name}.svg", plot.svg))
    written.append(atomic_write_json(folder / RESULTS, summary(run, comparison)))
    return written


def read_run(folder: Path) -> EvaluationRun:
    """Read a run back from its folder.

    Raises:
        DataError: if a file is missing, malformed, or the predictions do not fit the results.
    """
    path = folder / RESULTS
    value = parse_json(read_text(path), str(path))
    if value.get("format") != FORMAT:
        raise DataError(f"{path}: expected format {FORMAT!r}, got {value.get('format')!r}")
    predictions: dict[_Key, list[Mapping[str, Any]]] = {}
    lines = read_text(folder / PREDICTIONS).splitlines()
    for number, line in enumerate(lines, start=1):
        record = parse_object(line, where := f"{folder / PREDICTIONS}:{number}", ADVICE)
        for mark in ("exact", "official"):
            if not isinstance(record.get(mark), bool):
                raise DataError(f"{where}: expected true or false under {mark!r}, got {record.get(mark)!r}")
        model, seed = str(record.pop("model", "")), record.pop("training_seed", None)
        if seed is not None and type(seed) is not int:
            raise DataError(f"{where}: expected a whole number under 'training_seed', got {seed!r}")
        key = (model, seed, str(record.get("task")), str(record.get("length")))
        predictions.setdefault(key, []).append(record)
    items = value.get("results", ())
    seeds = _seeds_of_shared_labels(
        [(item.get("label", ""), item.get("model", {}).get("training", {})) for item in items]
    )
    results = tuple(_result(item, predictions, str(path), seed=seed) for item, seed in zip(items, seeds, strict=True))
    reports = tuple(report_from_dict(item) for item in value.get("diagnostics", ()))
    prompt = value.get("example_prompt", "")
    return EvaluationRun(results, value.get("command", ""), value.get("machine", {}), prompt, reports)


def summary(run: EvaluationRun, comparison: Comparison) -> dict[str, Any]:
    """Give the content of `results.json`: everything but the single predictions."""
    return {
        "format": FORMAT,
        "command": run.command,
        "machine": run.machine,
        "rule": comparison.rule,
        "notes": comparison.notes(),
        "example_prompt": run.example_prompt,
        "results": [_result_summary(result) for result in run.results],
        "tests": [asdict(test) for test in comparison.tests],
        "diagnostics": [asdict(report) for report in run.diagnostics],
    }


def markdown_page(run: EvaluationRun) -> str:
    """Write the tables of a run as one Markdown text without headings, ready to stand under any."""
    comparison = run.comparison
    parts = [
        f"**{tables.title(comparison)}.** {tables.caption(comparison)}\n",
        tables.accuracy_grid(comparison).markdown(),
        tables.model_grid(comparison).markdown(),
        "".join(f"- {note}\n" for note in comparison.notes()),
    ]
    if len(comparison.labels) > 1:
        parts += [f"{tables.tests_note(comparison)}\n", tables.test_grid(comparison).markdown()]
    if tables.has_retrieval(comparison):
        parts += [f"{tables.RETRIEVAL_NOTE}\n", tables.retrieval_grid(comparison).markdown()]
    parts += ["Mean accuracy in percent by both scoring rules:\n", tables.rules_grid(comparison).markdown()]
    if run.diagnostics:
        parts += ["What the memories do, means over a few samples:\n", memory_grid(run.diagnostics).markdown()]
        parts.append("".join(f"- {note}\n" for note in memory_notes()))
    parts.append(f"Command: `{run.command}`\n")
    return "\n".join(part for part in parts if part)


def _result_summary(result: BabilongResult) -> dict[str, Any]:
    value = asdict(result)
    for cell, record in zip(value["cells"], result.cells, strict=True):
        del cell["predictions"]
        cell["num_samples"] = len(record.predictions)
        cell["accuracy"] = {rule: asdict(record.accuracy(rule)) for rule in ("exact", "official")}
        cell["tokens_per_second"] = round(record.tokens_per_second, 1)
    return value


def _result(
    value: Mapping[str, Any], predictions: Mapping[_Key, list[Mapping[str, Any]]], name: str, *, seed: int | None
) -> BabilongResult:
    cells = []
    for cell in value.get("cells", ()):
        kept = {key: cell[key] for key in _CELL_FACTS if key in cell}
        kept["predictions"] = predictions.get((value["label"], seed, kept["task"], kept["length"]), [])
        if len(kept["predictions"]) != cell.get("num_samples"):
            raise DataError(f"{name}: {PREDICTIONS} does not hold the answers of {value['label']}; evaluate again")
        cells.append(kept)
    return result_from_dict({**value, "cells": cells}, name=name)


def _prediction_lines(run: EvaluationRun) -> str:
    lines = []
    seeds = _seeds_of_shared_labels([(result.label, result.model.training) for result in run.results])
    for result, seed in zip(run.results, seeds, strict=True):
        model = {"model": result.label} if seed is None else {"model": result.label, "training_seed": seed}
        for prediction in result.predictions():
            lines.append(json.dumps({**model, **asdict(prediction)}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _seeds_of_shared_labels(models: Sequence[tuple[str, Mapping[str, Any]]]) -> list[int | None]:
    """Return the training seed of every model whose label another one has too, else None."""
    shared = Counter(label for label, _ in models)
    return [training.get("seed") if shared[label] > 1 else None for label, training in models]
