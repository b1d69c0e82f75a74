"""The LM2 benchmark as a whole: settings, results, and the files they are kept in."""

import datetime
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mnemon.bench.cost import MemoryShape, ModelShape
from mnemon.bench.inference import InferenceRow, measure_inference
from mnemon.bench.settings import Settings
from mnemon.bench.timing import cpu_threads
from mnemon.bench.train_step import TrainRow, measure_training
from mnemon.errors import DataError
from mnemon.evaluation.machine import describe_machine
from mnemon.files import atomic_write_json, read_text


@dataclass(frozen=True)
class BenchRun:
    """Settings, circumstances and results."""

    settings: Settings
    command: str
    machine: dict[str, str]
    train: list[TrainRow] = field(default_factory=list)
    inference: list[InferenceRow] = field(default_factory=list)


def run_benchmark(settings: Settings, command: str, report: Callable[[str], None]) -> BenchRun:
    """Measure everything the settings ask for, with the number of threads they name.

    Args:
        settings: what to measure.
        command: how it was asked for, for the record.
        report: told what is measured next.
    """
    with cpu_threads(settings.threads):
        machine = {**describe_machine(settings.device), **circumstances()}
        train = measure_training(settings, report) if "train" in settings.parts else []
        inference = measure_inference(settings, report) if {"prefill", "decode"} & set(settings.parts) else []
    return BenchRun(settings, command, machine, train, inference)


def write_results(folder: Path, run: BenchRun) -> Path:
    """Write `results.json`."""
    return atomic_write_json(folder / "results.json", asdict(run))


def read_results(folder: Path) -> BenchRun:
    """Read `results.json` of a benchmark.

    Raises:
        DataError: if it is missing or not a benchmark of LM2.
    """
    path = folder / "results.json"
    try:
        content = json.loads(read_text(path))
        return BenchRun(
            _settings(content["settings"]),
            content["command"],
            content["machine"],
            [TrainRow(**{**row, "memory": MemoryShape(**row["memory"])}) for row in content["train"]],
            [InferenceRow(**row) for row in content["inference"]],
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected the results of `mnemon bench lm2`, got {error!r}; run it again") from error


def _settings(content: dict[str, Any]) -> Settings:
    shapes = {name: tuple(MemoryShape(**entry) for entry in content[name]) for name in ("memories", "readers")}
    lists = {name: tuple(content[name]) for name in ("parts", "batch_sizes", "contexts")}
    return Settings(**{**content, **shapes, **lists, "shape": ModelShape(**content["shape"])})


def circumstances() -> dict[str, str]:
    """Name the date and the commit, where the package runs from a git checkout."""
    facts = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return facts
    if done.returncode == 0:
        facts["commit"] = done.stdout.strip()
    return facts
