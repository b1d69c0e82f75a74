"""Look into weight files before loading them: the library itself only warns about tensors that do not fit."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from mnemon.errors import CheckpointError, ConfigError

_MAX_NAMED = 4

Shape = tuple[int, ...]


def check_model_folder(folder: Path) -> None:
    """Compare the names and shapes in a single-file checkpoint with those its configuration describes.

    Raises:
        CheckpointError: if files are missing or damaged, or tensors are missing, extra or mis-shaped (named).
    """
    weights = folder / "model.safetensors"
    if not weights.is_file():
        if list(folder.glob("model-*.safetensors")):
            return  # a sharded checkpoint: the library checks its index
        raise CheckpointError(f"{folder} has no model.safetensors; expected a saved model")
    stored = stored_shapes(weights)
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    compare_shapes(weights, stored, expected, optional=set(getattr(model, "all_tied_weights_keys", None) or {}))


def stored_shapes(weights: Path) -> dict[str, Shape]:
    """Return the shape of every tensor in a safetensors file, read from its header alone.

    Raises:
        CheckpointError: if the file is damaged or truncated.
    """
    try:
        with safe_open(str(weights), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights} is damaged or truncated: {error}") from error


def compare_shapes(
    weights: Path, stored: Mapping[str, Shape], expected: Mapping[str, Shape], optional: Collection[str] = ()
) -> None:
    """Refuse a file whose tensors are not the expected ones.

    Args:
        weights: file, for the message.
        stored: name -> shape in the file.
        expected: name -> shape in the model.
        optional: names that may be missing from the file (tied weights).

    Raises:
        CheckpointError: naming the missing, unknown or mis-shaped tensors.
    """
    _refuse("lacks", sorted(set(expected) - set(stored) - set(optional)), weights)
    _refuse("has unknown", sorted(set(stored) - set(expected)), weights)
    wrong = [key for key in sorted(set(stored) & set(expected)) if stored[key] != expected[key]]
    details = [f"{key} {list(stored[key])}, expected {list(expected[key])}" for key in wrong]
    _refuse("has mis-shaped", details, weights)


def _refuse(verb: str, names: list[str], weights: Path) -> None:
    if names:
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        raise CheckpointError(f"{weights} {verb} tensors: {', '.join(names[:_MAX_NAMED])}{more}")
