"""Which kind of run a folder holds, and reading it; unfinished runs and folders of another kind are refused by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemon.errors import DataError
from mnemon.evaluation import measures, run
from mnemon.evaluation.compare.curves import LOG, SUMMARY, TrainingCurve, read_curve
from mnemon.evaluation.results import parse_json
from mnemon.evaluation.run import EvaluationRun
from mnemon.evaluation.sample_scores import SAMPLES, SampleScore, read_sample_scores
from mnemon.files import RUN_MARKER, read_text


@dataclass(frozen=True)
class ScoreRun:
    """A run of a suite with a score per sample.

    Attributes:
        facts: what is known about every model, by label: parameters, recipe, training_seed, memory_blocks.
        rows: rows of `measures.MeasuredRun`; empty for other suites.
    """

    samples: tuple[SampleScore, ...]
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    command: str = ""


@dataclass(frozen=True)
class Source:
    """One folder or file with what stands in it.

    Attributes:
        name: as the user wrote it.
        prefix: label given with it, "" if none.
    """

    name: str
    prefix: str
    content: EvaluationRun | ScoreRun | TrainingCurve


def read_sources(arguments: Sequence[str]) -> list[Source]:
    """Read `[LABEL=]RUN` arguments; a folder of several runs gives each of them.

    Raises:
        DataError: if a folder is no run, the run is not finished, or a file is malformed; folder, file and line are
            named.
    """
    sources = []
    for argument in arguments:
        prefix, path = _split(argument)
        folders = [path]
        if path.is_dir() and not _is_run(path):
            folders = sorted(inner for inner in path.iterdir() if inner.is_dir() and _is_finished(inner)) or [path]
        sources += [Source(str(folder), prefix, read_content(folder)) for folder in folders]
    return sources


def read_content(path: Path) -> EvaluationRun | ScoreRun | TrainingCurve:
    """Read one finished run: an evaluation, a suite of samples, or a training run.

    Args:
        path: folder of a run, or a file of samples.

    Raises:
        DataError: as `read_sources`.
    """
    if path.is_file():
        return ScoreRun(read_sample_scores(path))
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected the folder of a finished run")
    if (path / run.RESULTS).is_file():
        return _read_evaluation(path)
    if (path / LOG).is_file() or (path / SUMMARY).is_file():
        return read_curve(path)
    if (path / "cells").is_dir() or (path / run.PREDICTIONS).is_file() or (path / SAMPLES).is_file():
        raise DataError(f"{path}: the evaluation is not finished (no {run.RESULTS}); go on with mnemon eval --resume")
    if (path / RUN_MARKER).is_file():
        raise DataError(f"{path}: the run was interrupted before it wrote anything; run it again")
    raise DataError(f"{path}: is no run; expected a folder with {run.RESULTS} or {LOG}")


def _read_evaluation(folder: Path) -> EvaluationRun | ScoreRun:
    path = folder / run.RESULTS
    value = parse_json(read_text(path), str(path))
    if value.get("format") == run.FORMAT:
        read = run.read_run(folder)
        for result in read.results:
            held = {(cell.task, cell.length) for cell in result.cells}
            for task in result.settings.tasks:
                for length in result.settings.lengths:
                    if (task, length) not in held:
                        raise DataError(
                            f"{path}: {result.label} lacks {task} at {length}; go on with mnemon eval --resume"
                        )
        if not read.results:
            raise DataError(f"{path}: holds no result; evaluate again")
        return read
    if value.get("format") == measures.FORMAT or (folder / SAMPLES).is_file():
        samples = read_sample_scores(folder / SAMPLES) if (folder / SAMPLES).is_file() else ()
        if not samples:
            raise DataError(f"{folder}: holds no {SAMPLES} with a score per sample; evaluate again with this version")
        rows = value.get("rows", ())
        is_measured = value.get("format") == measures.FORMAT
        facts = {row["model"]: row for row in rows} if is_measured else _facts(value)
        return ScoreRun(samples, facts, tuple(rows) if is_measured else (), str(value.get("command", "")))
    raise DataError(f"{path}: expected results of mnemon eval, got the format {value.get('format')!r}")


def _facts(value: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    models = value.get("models")
    if not isinstance(models, dict):
        return {}
    return {label: facts for label, facts in models.items() if isinstance(facts, dict)}


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in (run.RESULTS, LOG, SUMMARY, "cells", SAMPLES, RUN_MARKER))


def _is_finished(path: Path) -> bool:
    return any((path / name).is_file() for name in (run.RESULTS, SUMMARY))


def _split(argument: str) -> tuple[str, Path]:
    label, equals, name = argument.partition("=")
    if equals and label.strip() and name and "/" not in label:
        return label.strip(), Path(name)
    return "", Path(argument)
