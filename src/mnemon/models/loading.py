"""Load a model and its tokenizer by name: a local folder, a checkpoint shipped with the library, or a hub name."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mnemon.errors import CheckpointError, ConfigError, MnemonError
from mnemon.models.registration import register

_MAX_NAMED = 4


def shipped_checkpoints() -> dict[str, Path]:
    """Return the checkpoints that come with the library, by name."""
    root = Path(str(resources.files("mnemon"))) / "checkpoints"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/config.json"))}


def resolve(name: str) -> str:
    """Turn a MODEL argument into what Hugging Face loads: a folder, a shipped checkpoint's folder or a hub name.

    Raises:
        CheckpointError: for a folder without `config.json`, or a name that is neither a folder nor a hub name.
    """
    folder = Path(name).expanduser()
    if name.strip() and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{name} is a folder without config.json; expected a saved model")
        return str(folder)
    shipped = shipped_checkpoints()
    if name in shipped:
        return str(shipped[name])
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip()
    if looks_local or "/" not in name:
        known = ", ".join(shipped) or "none"
        raise CheckpointError(
            f"no model {name!r}: expected a folder, a hub name (owner/model) or a shipped checkpoint ({known})"
        )
    return name


def load_model(
    name: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode, and its tokenizer (padding on the left, as generation needs).

    Args:
        name: a local folder, a shipped checkpoint's name, or a hub name.
        dtype: dtype to load into; None = the checkpoint's.
        device: where to put the model.
    Raises:
        CheckpointError: if files are missing or damaged, or tensors are missing, extra or mis-shaped (named).
    """
    register()
    source = resolve(name)
    if Path(source).is_dir():
        _check_tensors(Path(source))
    try:
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except MnemonError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"cannot load {name}: {first}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.to(device).eval(), tokenizer


def _check_tensors(folder: Path) -> None:
    """Compare the names and shapes in a single-file checkpoint with those its configuration describes.

    The library itself only warns about missing or extra tensors and goes on with random ones.
    """
    weights = folder / "model.safetensors"
    if not weights.is_file():
        if list(folder.glob("model-*.safetensors")):
            return  # a sharded checkpoint: the library checks its index
        raise CheckpointError(f"{folder} has no model.safetensors; expected a saved model")
    try:
        with safe_open(str(weights), framework="pt") as file:  # reads the header only
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights} is damaged or truncated: {error}") from error
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    _refuse("lacks", sorted(set(expected) - set(stored) - tied), weights)
    _refuse("has unknown", sorted(set(stored) - set(expected)), weights)
    wrong = [key for key in sorted(set(stored) & set(expected)) if stored[key] != expected[key]]
    details = [f"{key} {list(stored[key])}, expected {list(expected[key])}" for key in wrong]
    _refuse("has mis-shaped", details, weights)


def _refuse(verb: str, names: list[str], weights: Path) -> None:
    if names:
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        raise CheckpointError(f"{weights} {verb} tensors: {', '.join(names[:_MAX_NAMED])}{more}")
