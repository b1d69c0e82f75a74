"""The decoder under a memory: load it, freeze it, tell it from every other.

A decoder that carries PEFT layers (LoRA and alike) is still the same base: its *own* tensors are those PEFT wraps, and
only they are frozen and fingerprinted. PEFT's layers are recognised by structure; the package itself is not needed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mnemon.errors import CheckpointError, ConfigError, MnemonError
from mnemon.models.names import is_adapter, resolve

_CHUNK_BYTES = 64 * 2**20
_MAX_NAMED = 4
_WRAPPED = ("base_layer", "original_module")  # what PEFT calls the module that one of its layers stands in for


@dataclass(frozen=True)
class BaseReference:
    """Which decoder a memory belongs to.

    Attributes:
        name_or_path: where it was loaded from, a folder (absolute) or a hub name; None if it was built in memory.
        commit_hash: commit of the hub repository, if it came from there.
        model_type: Hugging Face's name of its architecture.
        dtype: dtype its weights are in, such as `float32`.
        fingerprint: see `fingerprint`.
    """

    name_or_path: str | None
    commit_hash: str | None
    model_type: str
    dtype: str
    fingerprint: str


def as_base(model_or_name: Any) -> PreTrainedModel:
    """Return a decoder ready to be grafted on: loaded if a name is given, and with its weights safe from being redrawn.

    Args:
        model_or_name: a causal language model, a `PeftModel` around one, or a name for `load_base`.

    Raises:
        ConfigError: for a model that has a memory around it already, or one that PEFT gave a prompt instead of layers.
        CheckpointError: if there is no such model, or its files are damaged.
    """
    base: Any = load_base(model_or_name) if isinstance(model_or_name, str | Path) else model_or_name
    if hasattr(base, "get_base_model"):  # a PeftModel: its layers sit inside the decoder and stay there
        for settings in base.peft_config.values():
            if settings.is_prompt_learning:
                raise ConfigError(f"{settings.peft_type} puts tokens before the prompt, which a memory cannot follow")
        base = base.get_base_model()
    if base.config.model_type in ("lm2", "rmt"):
        raise ConfigError("this model has a memory already; expected a plain decoder")
    # The library draws values for every module without this mark: PEFT's layers, and embeddings that were resized.
    for module in base.modules():
        module._is_hf_initialized = True
    decoder: PreTrainedModel = base
    return decoder


def load_base(name: str | Path, *, dtype: torch.dtype | None = None, revision: str | None = None) -> PreTrainedModel:
    """Load a plain decoder in evaluation mode.

    Args:
        name: a local folder, a shipped checkpoint's name, or a hub name.
        dtype: dtype to load into; None = the checkpoint's.
        revision: commit of a hub repository.

    Raises:
        CheckpointError: if there is no such model, its files are damaged, or weights are missing from them (named).
    """
    source = resolve(str(name))
    if is_adapter(source):
        raise CheckpointError(f"{name} is an adapter; expected the plain decoder under a memory")
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if revision is not None:
        options["revision"] = revision
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except MnemonError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"cannot load the base {name}: {first}") from error
    base: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # the library goes on with random values
        raise CheckpointError(f"{name} lacks weights of the decoder: {', '.join(missing[:_MAX_NAMED])}")
    return base


def freeze(base: PreTrainedModel) -> None:
    """Take the base's own tensors out of training; PEFT layers on it stay as they are."""
    for tensor in own_tensors(base).values():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(False)


def describe(base: PreTrainedModel) -> BaseReference:
    """Return which decoder this is; reads all its weights once (see `fingerprint`)."""
    name = base.config._name_or_path or None
    if name is not None and Path(name).is_dir():  # the working directory may be another when the name is used
        name = str(Path(name).resolve())
    return BaseReference(
        name_or_path=name,
        commit_hash=getattr(base.config, "_commit_hash", None),
        model_type=base.config.model_type,
        dtype=str(base.dtype).removeprefix("torch."),
        fingerprint=fingerprint(base),
    )


def fingerprint(base: nn.Module) -> str:
    """Return the sha256 of a model's own tensors: names, dtypes, shapes and bytes, in the order of the names.

    It is the same on every device, and with or without PEFT layers on the model; a tied weight counts once, and
    buffers that are not saved count not at all. The same weights in another dtype are another model.

    It costs one pass over the weights at the speed of sha256 (about 1.2 GB/s on one core), and copies 64 MiB at a time
    where the weights are not on the CPU, or a whole tensor where it is not contiguous.
    """
    return fingerprint_of(own_tensors(base))


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of named tensors, in the order of their names (see `fingerprint`)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        head = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(head).encode() + b"\n")
        for piece in _pieces(tensor):
            digest.update(piece.numpy().data)
    return digest.hexdigest()


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model itself would save, each tied tensor once, under its names without PEFT layers."""
    wrappers = peft_layers(model)
    found: dict[str, Tensor] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        outer = [wrapper for wrapper in wrappers if name.startswith(f"{wrapper}.")]
        if all(name.startswith(f"{wrapper}.{wrappers[wrapper]}.") for wrapper in outer):
            found[".".join(part for part in name.split(".") if part not in _WRAPPED)] = tensor
    first: dict[int, str] = {}
    return {name: tensor for name, tensor in sorted(found.items()) if first.setdefault(id(tensor), name) == name}


def peft_layers(model: nn.Module) -> dict[str, str]:
    """Return the modules that PEFT put in place of others: name -> the attribute that holds the original."""
    return {
        name: inner
        for name, module in model.named_modules()
        for inner in _WRAPPED
        if inner in dict(module.named_children())
    }


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().contiguous().reshape(-1)
    for piece in flat.split(max(1, _CHUNK_BYTES // flat.element_size())):
        yield piece.cpu().view(torch.uint8)
