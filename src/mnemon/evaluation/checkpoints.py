"""Checkpoints as rows of a comparison, and what their folders say about their own training.

That is read from the files that `mnemon train` leaves beside a model. Models from elsewhere have none of these files;
then nothing is known and nothing is claimed.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from mnemon.errors import CheckpointError, DataError, MnemonError
from mnemon.evaluation.controls import ModelSpec
from mnemon.evaluation.results import LAYOUTS, Layout
from mnemon.files import read_text
from mnemon.models.loading import load_model, resolve
from mnemon.models.names import is_adapter
from mnemon.models.registration import register
from mnemon.models.weight_files import check_model_folder

RECIPE = "recipe.yaml"
_FACTS = ("name", "seed", "tokens", "steps", "trained_length", "version")


def load_spec(label: str, name: str, *, device: str = "cpu", source: str | None = None) -> ModelSpec:
    """Load a model with its tokenizer and the facts about its training.

    Args:
        label: name in tables and plots.
        name: a local folder, a shipped checkpoint's name, or a hub name.
        device: where to put the model.
        source: what the record says about where it came from; None = `name`.

    Raises:
        CheckpointError: if there is no such model, or its files are damaged.
        DataError: if the facts about its training cannot be read.
    """
    model, tokenizer = load_model(name, device=device)
    return ModelSpec(label, model, tokenizer, source=source or name, training=training_facts(resolve(name)))


def load_network_spec(label: str, name: str, *, device: str = "cpu", source: str | None = None) -> ModelSpec:
    """Load a model whose folder holds no tokenizer, such as one trained on MQAR, and the facts about its training.

    Args:
        label: name in tables and plots.
        name: a local folder or a hub name.
        device: where to put the model.
        source: what the record says about where it came from; None = `name`.

    Raises:
        CheckpointError: if there is no such model, or its files are damaged.
        DataError: if the facts about its training cannot be read.
    """
    register()
    place = resolve(name)
    try:
        if Path(place).is_dir():
            check_model_folder(Path(place))
        model: Any = AutoModelForCausalLM.from_pretrained(place)
    except MnemonError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"cannot load {name}: {first}") from error
    return ModelSpec(label, model.to(device).eval(), None, source=source or name, training=training_facts(place))


def has_tokenizer(name: str) -> bool:
    """Say whether a model comes with a tokenizer, as far as is known without loading it: a hub name is taken to."""
    place = Path(resolve(name))
    return not place.is_dir() or is_adapter(place) or any(place.glob("tokenizer*"))


def trained_data(folder: str | Path) -> dict[str, Any]:
    """Give the `data` section of the recipe a model was trained by; empty if nothing is known.

    Raises:
        DataError: if the recipe is there but cannot be read.
    """
    return _section(folder, "data")


def training_facts(folder: str | Path) -> dict[str, Any]:
    """Read tokens seen, longest trained length, seed and steps from `summary.json`; empty if there is none.

    Raises:
        DataError: if the file is there but cannot be read.
    """
    path = Path(folder) / "summary.json"
    if not path.is_file():
        return {}
    try:
        summary = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    return {key: summary[key] for key in _FACTS if summary.get(key) is not None}


def trained_layout(folder: str | Path) -> Layout:
    """Give the prompt layout a model was trained for: `evaluation.layout` of its recipe, else "official".

    Raises:
        DataError: if the recipe is there but cannot be read, or names an unknown layout.
    """
    wanted = _section(folder, "evaluation").get("layout", "official")
    for layout in LAYOUTS:
        if wanted == layout:
            return layout
    raise DataError(f"{Path(folder) / RECIPE}: evaluation.layout must be one of {', '.join(LAYOUTS)}, got {wanted!r}")


def trained_tasks(folder: str | Path) -> list[str]:
    """Give the tasks a model was trained on, from `data.tasks` of its recipe; empty if nothing is known.

    Raises:
        DataError: if the recipe is there but cannot be read.
    """
    return [str(task) for task in _section(folder, "data").get("tasks", ())]


def _section(folder: str | Path, name: str) -> dict[str, Any]:
    path = Path(folder) / RECIPE
    if not path.is_file():
        return {}
    try:
        recipe = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    section = recipe.get(name) if isinstance(recipe, dict) else None
    return section if isinstance(section, dict) else {}
