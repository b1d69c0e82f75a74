"""Losses of finished training runs, from the log that `mnemon train` leaves in its folder."""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mnemon.errors import DataError
from mnemon.evaluation.sample_scores import ADVICE
from mnemon.files import parse_object, read_text

LOG, SUMMARY, RECIPE = "training_log.jsonl", "summary.json", "recipe.yaml"
_LAST_SHARE = 0.1


@dataclass(frozen=True)
class TrainingCurve:
    """One finished training run.

    Attributes:
        name: recipe's name.
        kind: what was learned: "text", "babilong", "mqar"; "" if unknown.
        tokens: tokens seen at every entry of the log, ascending.
        losses: mean training loss since the entry before, nats per token that counts.
        memory_blocks: blocks with a memory; None if that cannot be told from the weights.
        recipe: digest of the recipe without seed and output, "" if there is no recipe.
    """

    name: str
    seed: int | None
    kind: str
    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    minutes: float | None = None
    parameters: int | None = None
    memory_blocks: int | None = None
    recipe: str = ""

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the log, at least its last entry."""
        last = self.losses[-max(1, round(_LAST_SHARE * len(self.losses))) :]
        return sum(last) / len(last)


def read_curve(folder: Path) -> TrainingCurve:
    """Read the curve of a finished training run.

    Raises:
        DataError: if the run was interrupted or is still going, or a line of its log is malformed or not finite.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise DataError(f"{folder}: the training is not finished (no {SUMMARY}); go on with mnemon train --resume")
    summary = parse_object(read_text(path), str(path), ADVICE)
    if summary.get("stop_reason") == "interrupted":
        raise DataError(f"{folder}: the training was interrupted; go on with mnemon train --resume")
    if not (folder / LOG).is_file():
        raise DataError(f"{folder}: holds no {LOG}; without it there is no curve to compare")
    tokens, losses = [], []
    for number, line in enumerate(read_text(folder / LOG).splitlines(), start=1):
        where = f"{folder / LOG}, line {number}"
        entry = parse_object(line, where, ADVICE)
        for key in ("tokens", "loss"):
            if isinstance(entry.get(key), bool) or not isinstance(entry.get(key), int | float):
                raise DataError(f"{where}: expected a number under {key!r}, got {entry.get(key)!r}")
        tokens.append(int(entry["tokens"]))
        losses.append(float(entry["loss"]))
    recipe = read_recipe(folder)
    parameters = summary.get("parameters")
    data = recipe.get("data")
    return TrainingCurve(
        name=str(summary.get("name", folder.name)),
        seed=summary.get("seed"),
        kind=str(data.get("kind", "babilong")) if isinstance(data, dict) else "",
        tokens=tuple(tokens),
        losses=tuple(losses),
        minutes=summary.get("minutes"),
        parameters=parameters.get("total") if isinstance(parameters, dict) else None,
        memory_blocks=_memory_blocks(folder),
        recipe=recipe_digest(recipe),
    )


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """Read the recipe a model was trained by; empty if there is none that can be read."""
    path = Path(folder) / RECIPE
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """Identify a recipe by everything that is not its seed, its name or where it writes; "" for an empty one."""
    kept = {key: value for key, value in recipe.items() if key not in ("seed", "name", "output")}
    return json.dumps(kept, sort_keys=True, default=str) if kept else ""


def perplexity(loss: float) -> float:
    """Give the perplexity of a loss in nats, kept finite."""
    return math.exp(min(loss, 50.0))


def _memory_blocks(folder: Path) -> int | None:
    """Count the banks in the header of the weights, which names all tensors without reading them."""
    path = folder / "model.safetensors"
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, 100_000_000)))
    except (OSError, ValueError, struct.error):
        return None
    return len({found.group(1) for name in header if (found := re.match(r"memory\.(\d+)\.", name))})
