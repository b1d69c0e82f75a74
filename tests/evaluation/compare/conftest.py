"""Folders of finished runs, written in a moment: no model is run and no figure drawn."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.results import BabilongResult
from mnemon.evaluation.run import EvaluationRun, summary


@pytest.fixture
def write_babilong(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, results: Sequence[BabilongResult]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        run = EvaluationRun(tuple(results), f"mnemon eval {name}")
        lines = [
            json.dumps({"model": result.label, **vars(prediction)})
            for result in results
            for prediction in result.predictions()
        ]
        (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "results.json").write_text(json.dumps(summary(run, Comparison(results))))
        return folder

    return write


@pytest.fixture
def write_samples(tmp_path: Path) -> Callable[..., Path]:
    """Write a run of a suite as the harness does: facts of the models, and a line per sample."""

    def write(
        name: str,
        scores: Mapping[str, Mapping[str, Sequence[float]]],
        *,
        suite: str = "recall",
        metric: str = "acc",
        facts: Mapping[str, Mapping[str, Any]] | None = None,
        asked: str = "",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            {
                "model": model, "suite": suite, "task": task, "id": f"{task}-{number}", "score": score,
                "metric": metric, "sample_sha256": f"{asked}{task}{number}", "output": "text",
            }
            for model, tasks in scores.items()
            for task, values in tasks.items()
            for number, score in enumerate(values)
        ]  # fmt: skip
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        models = {model: dict((facts or {}).get(model, {})) for model in scores}
        value = {"format": "mnemon-harness-1", "suite": suite, "models": models, "rows": [], "command": "x"}
        (folder / "results.json").write_text(json.dumps(value))
        return folder

    return write


@pytest.fixture
def write_training(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *, seed: int = 0, kind: str = "text", recipe: str = "tiny", blocks: int | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        entries = [{"step": n, "tokens": 1000 * n, "loss": 6 / n + 0.1 * seed} for n in range(1, 31)]
        (folder / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        facts = {"name": recipe, "seed": seed, "tokens": 30_000, "minutes": 2.5, "stop_reason": "max_tokens"}
        (folder / "summary.json").write_text(json.dumps({**facts, "parameters": {"total": 1000}}))
        (folder / "recipe.yaml").write_text(f"name: {recipe}\nseed: {seed}\ndata: {{kind: {kind}}}\n")
        if blocks is not None:
            header = json.dumps({f"memory.{n}.query.weight": {"dtype": "F32"} for n in range(blocks)}).encode()
            (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        return folder

    return write
