"""Save and load a memory alone, as a small folder that names the decoder it belongs to.

    memory.safetensors      the weights of the memory banks
    adapter_config.json     format version, memory options, reference to the base, checksum of the weights

A memory means nothing on other weights than those it was trained on, so the folder holds the base's fingerprint, and
both saving and loading compare it: saving refuses a base that has changed since the memory was put on it, loading
refuses any other base. Which decoder is meant and how it is fingerprinted is `mnemon.models.base_model`.
"""

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

import mnemon
from mnemon.errors import CheckpointError, ConfigError
from mnemon.files import atomic_write_bytes, atomic_write_json
from mnemon.models.base_model import BaseReference, as_base, describe, fingerprint, freeze, load_base, peft_layers
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.names import ADAPTER_CONFIG, MODEL_CONFIG, shipped_checkpoints
from mnemon.models.weight_files import compare_shapes

if TYPE_CHECKING:
    from mnemon.models.modeling_lm2 import LM2ForCausalLM

    Model = TypeVar("Model", bound=LM2ForCausalLM)

FORMAT: Literal["mnemon-memory"] = "mnemon-memory"
FORMAT_VERSION = 1
"""Version of the folder's layout; raised when an older mnemon could no longer read it rightly."""
WEIGHTS_FILE = "memory.safetensors"

_SHOWN = 16  # digits of a fingerprint in a message: enough to tell two apart


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class AdapterConfig(_Entry):
    """Content of `adapter_config.json`.

    Attributes:
        format, format_version: what the file is, and which layout the folder has.
        mnemon_version: of the library that wrote it.
        lm2: the fields of `LM2Config` apart from the base's configuration.
        base: the decoder. A local folder is given relative to the adapter's own and then begins with a dot.
        weights_sha256: checksum of `memory.safetensors`.
    """

    format: Literal["mnemon-memory"]
    format_version: int
    mnemon_version: str
    lm2: dict[str, Any]
    base: BaseReference
    weights_sha256: str


def save_adapter(model: "LM2ForCausalLM", folder: str | Path) -> Path:
    """Write the memory of a model, without its base.

    The weights are written first and the configuration last, each whole or not at all. An interruption between the two
    leaves a checksum that does not fit, which loading recognises.

    Args:
        model: made by `from_base(..., freeze_base=True)` or by `from_adapter`.
        folder: where to; made when missing, an adapter of ours in it is replaced.

    Returns:
        The folder as a `Path`.

    Raises:
        ConfigError: if the model has no memory, its base is not known or has changed, PEFT layers sit on the memory
            itself, or the folder holds something else.
        RunError: if the folder cannot be written.
    """
    target = Path(folder)
    _refuse_unsavable(model)
    _refuse_occupied(target)
    assert model.base_reference is not None
    reference = vars(model.base_reference) | {"name_or_path": _portable(model.base_reference.name_or_path, target)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.memory.state_dict().items()}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config = AdapterConfig(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        mnemon_version=mnemon.__version__,
        lm2={name: getattr(model.config, name) for name in _memory_options()},
        base=BaseReference(**reference),
        weights_sha256=hashlib.sha256(data).hexdigest(),
    )
    atomic_write_bytes(target / WEIGHTS_FILE, data)
    atomic_write_json(target / ADAPTER_CONFIG, config.model_dump(mode="json"))
    return target


def load_adapter(
    model_class: "type[Model]", folder: str | Path, base: PreTrainedModel | str | Path | None = None
) -> "Model":
    """Put a saved memory on its base.

    Args:
        model_class: class of the model to build.
        folder: adapter folder.
        base: the decoder, or where to load it from; None = where the adapter says. A name is loaded in the dtype that
            the adapter was made with.

    Returns:
        The model in evaluation mode, its base frozen.

    Raises:
        CheckpointError: if the folder holds no adapter, a newer or a damaged one, one whose tensors do not fit its
            options, or if the base is missing or another one.
        ConfigError: if the options do not fit the base.
    """
    path = Path(folder)
    config = read_config(path)
    tensors = _read_weights(path, config)
    decoder = as_base(_load_base(path, config.base, base) if base is None or isinstance(base, str | Path) else base)
    found = describe(decoder)
    if found.fingerprint != config.base.fingerprint:
        raise CheckpointError(f"{path}: {_other_base(config.base, found)}")
    try:
        with torch.random.fork_rng(devices=[]):  # the values drawn here are replaced by the adapter's
            model = model_class.from_base(decoder, **config.lm2)
    except ConfigError as error:
        raise ConfigError(f"{path / ADAPTER_CONFIG}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.memory.state_dict().items()}
    compare_shapes(path / WEIGHTS_FILE, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    model.memory.load_state_dict(tensors)
    freeze(decoder)
    model.base_reference = found
    return model.eval()


def read_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json`.

    Raises:
        CheckpointError: if it is missing, of another kind or a newer version, or not what it should be.
    """
    path = folder / ADAPTER_CONFIG
    raw = _read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        peft = "; it is PEFT's: load it with peft.PeftModel" if isinstance(raw, dict) and "peft_type" in raw else ""
        raise CheckpointError(f"{path} does not describe a memory (no format: {FORMAT}){peft}")
    version = raw.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this mnemon reads up to {FORMAT_VERSION}; update mnemon "
            f"(written by {raw.get('mnemon_version')})"
        )
    try:
        return TypeAdapter(AdapterConfig).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {key}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {ADAPTER_CONFIG}; expected a saved adapter") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _read_weights(folder: Path, config: AdapterConfig) -> dict[str, Tensor]:
    """Read the memory's weights after checking that they are the ones that were written."""
    path = folder / WEIGHTS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); the adapter is incomplete") from None
    if hashlib.sha256(data).hexdigest() != config.weights_sha256:
        raise CheckpointError(f"{path} is truncated or altered: its sha256 is not the one in {ADAPTER_CONFIG}")
    return safetensors.torch.load(data)


def _load_base(folder: Path, wanted: BaseReference, name: str | Path | None) -> PreTrainedModel:
    """Load the base that an adapter names, or the one the user names instead, in the adapter's dtype."""
    dtype = getattr(torch, wanted.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: base.dtype: torch has no dtype {wanted.dtype!r}")
    if name is not None:
        return load_base(name, dtype=dtype)
    if wanted.name_or_path is None:
        raise CheckpointError(f"{folder} does not say where its base is; load it with from_adapter(folder, base=...)")
    if not wanted.name_or_path.startswith("."):
        return load_base(wanted.name_or_path, dtype=dtype, revision=wanted.commit_hash)
    place = Path(os.path.normpath(folder.resolve() / wanted.name_or_path))
    if not place.is_dir():
        raise CheckpointError(
            f"{folder}: its base is not at {place}; put it there, correct base.name_or_path in {ADAPTER_CONFIG}, or "
            "use from_adapter(folder, base=...)"
        )
    return load_base(str(place), dtype=dtype)


def _other_base(wanted: BaseReference, found: BaseReference) -> str:
    differs = [
        f"{field} {getattr(found, field)} instead of {getattr(wanted, field)}"
        for field in ("model_type", "dtype")
        if getattr(found, field) != getattr(wanted, field)
    ]
    why = f" ({', '.join(differs)})" if differs else ""
    return (
        f"the adapter is for another base: expected fingerprint {wanted.fingerprint[:_SHOWN]}, got "
        f"{found.fingerprint[:_SHOWN]}{why}; load the base it was trained on, {wanted.name_or_path or 'unnamed'}"
    )


def _refuse_unsavable(model: "LM2ForCausalLM") -> None:
    """Refuse a model whose memory alone would not bring it back."""
    if not model.banks:
        raise ConfigError("the model has no memory, so there is nothing to save as an adapter")
    if peft_layers(model.memory):
        raise ConfigError("PEFT layers sit on the memory itself; merge them, or leave the memory out of target_modules")
    if model.base_reference is None:
        raise ConfigError(
            "which base the memory belongs to is not known: it was not grafted with from_base(..., freeze_base=True); "
            "do that, or save the whole model with save_pretrained"
        )
    now = fingerprint(model.base)
    if now != model.base_reference.fingerprint:
        raise ConfigError(
            f"the base has changed since the memory was put on it: fingerprint {now[:_SHOWN]}, then "
            f"{model.base_reference.fingerprint[:_SHOWN]}; save the whole model with save_pretrained"
        )


def _refuse_occupied(folder: Path) -> None:
    """Refuse a folder in which the adapter would replace, or be hidden by, something else."""
    if (folder / MODEL_CONFIG).is_file():
        raise ConfigError(f"{folder} holds a whole model; choose another folder for the adapter")
    if (folder / ADAPTER_CONFIG).is_file():
        try:
            ours = _read_json(folder / ADAPTER_CONFIG).get("format") == FORMAT
        except (CheckpointError, AttributeError):
            ours = False
        if not ours:
            raise ConfigError(f"{folder} holds an adapter of another kind (PEFT's?); choose another folder")


def _memory_options() -> list[str]:
    """Return the fields that `LM2Config` adds to the library's own, apart from the base's configuration."""
    own = LM2Config.__annotations__
    return [field.name for field in fields(LM2Config) if field.name in own and field.name != "base_config"]


def _portable(name: str | None, folder: Path) -> str | None:
    """Return where the base is, so that it holds elsewhere too: a local folder relative to the adapter's."""
    if name is None or not Path(name).is_dir():
        return name
    place = Path(name).resolve()
    for shipped, known in shipped_checkpoints().items():
        if known.resolve() == place:
            return shipped
    relative = Path(os.path.relpath(place, folder.resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"
