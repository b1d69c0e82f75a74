"""Convert checkpoints of MoM: published folders to ours, and ours to flash-linear-attention.

Tensors are renamed, stacked and cut, never changed: what is converted there and back is the same to the bit. Names and
shapes are checked before anything is written, and what is written appears whole or not at all.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from mnemon.errors import CheckpointError, ConfigError, MnemonError
from mnemon.files import atomic_write_json, complete_folder
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.modeling_mom import MoMForCausalLM
from mnemon.models.mom_formats import find_format, is_ours, published_config, read_config
from mnemon.models.mom_tensors import Correspondence, correspondences
from mnemon.models.names import MODEL_CONFIG
from mnemon.models.tensor_files import SHARD_BYTES, StoredTensors, write_tensors
from mnemon.models.weight_files import Shape, compare_shapes

Target = Literal["mnemon", "fla"]
Track = Callable[[Sequence[Correspondence]], Iterable[Correspondence]]

_EMBEDDING, _HEAD = "model.embeddings.weight", "lm_head.weight"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
_OTHER_FILES = ("generation_config.json",)


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        source_format: model type of what was read, "mnemon" for ours.
        target_format: model type of what was written.
        parameters: numbers written.
        dtype: dtype of most of them.
        notes: what the user should know.
    """

    source_format: str
    target_format: str
    parameters: int
    dtype: str
    notes: list[str]


@dataclass(frozen=True)
class _Plan:
    """What to write, checked against what is there."""

    stored: StoredTensors
    table: list[Correspondence]
    config: dict[str, Any]
    source_format: str
    target_format: str
    notes: list[str]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Target = "mnemon",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    track: Track = iter,
) -> Conversion:
    """Convert a checkpoint folder into another.

    Args:
        source: folder with config.json and safetensors; see `docs/convert.md` for the formats.
        destination: folder to write.
        to: "mnemon" for a MoM of ours, "fla" for flash-linear-attention's `mom` (or `gated_deltanet`, if every layer
            has a single memory).
        overwrite: replace a folder that an earlier conversion or run has written.
        shard_bytes: most bytes of one weight file.
        track: wraps the work, to show its progress.

    Returns:
        What was converted.

    Raises:
        ConfigError: if the target has no such model (the reason is named), or the destination is taken.
        CheckpointError: if files are missing or damaged, or tensors are missing, extra or mis-shaped (named).
        RunError: if the destination cannot be written.
    """
    folder = Path(source)
    if folder.resolve() == Path(destination).resolve():
        raise ConfigError(f"{source} cannot be converted into itself; name another folder to write")
    fields = _read_config_file(folder)
    plan = _plan_import(folder, fields) if to == "mnemon" else _plan_export(folder, fields)
    with complete_folder(destination, overwrite) as target:
        parameters = write_tensors(target, _converted(plan, to, track), shard_bytes)
        copied = _copy_files(folder, target)
        atomic_write_json(target / MODEL_CONFIG, plan.config)
    notes = list(plan.notes)
    if not any(name in _TOKENIZER_FILES for name in copied):
        notes.append("there was no tokenizer to copy; `mnemon generate` needs one in the folder")
    dtype = str(plan.stored.dtype()).removeprefix("torch.")
    return Conversion(plan.source_format, plan.target_format, parameters, dtype, notes)


def _read_config_file(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MODEL_CONFIG}; expected the local folder of a checkpoint")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(fields).__name__}")
    return fields


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Say in one line what the library has against a configuration."""
    try:
        yield
    except MnemonError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / MODEL_CONFIG} cannot be used: {' '.join(str(error).split())}") from error


def _plan_import(folder: Path, fields: dict[str, Any]) -> _Plan:
    if is_ours(fields):
        raise ConfigError(f"{folder} is a model of mnemon already; add --to fla to convert it the other way")
    published = find_format(fields)
    stored = StoredTensors(folder)
    tied = _is_tied(stored, bool(fields.get("tie_word_embeddings", published.defaults["tie_word_embeddings"])))
    with _one_line(folder):
        config, notes = read_config(published, fields, stored.shapes, tied)
    unused = {f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in published.unused}
    if unused & stored.shapes.keys():
        notes.append(f"left out, the published layer never reads them: {', '.join(published.unused)}")
    fused = not any(name.endswith(".mlp.up_proj.weight") for name in stored.shapes)
    table = correspondences(config, several=published.several, tied=tied, fused_feed_forward=fused)
    expected = _published_shapes(config, table, tied)
    leave_out = unused | ({_HEAD} if tied else set())
    compare_shapes(folder, {name: s for name, s in stored.shapes.items() if name not in leave_out}, expected)
    _refuse_mixed_dtypes(stored, [entry.theirs for entry in table])
    config.architectures = [MoMForCausalLM.__name__]
    config.dtype = stored.dtype()
    return _Plan(stored, table, json.loads(config.to_json_string()), published.model_type, "mnemon", notes)


def _plan_export(folder: Path, fields: dict[str, Any]) -> _Plan:
    if not is_ours(fields):
        kind = fields.get("model_type")
        raise ConfigError(f"{folder} holds a {kind!r}, not a MoM of mnemon; --to fla needs one")
    with _one_line(folder):
        config: MoMConfig = MoMConfig.from_dict(fields)
    published, written, notes = published_config(config)
    tied = written["tie_word_embeddings"]
    stored = StoredTensors(folder)
    table = correspondences(config, several=published.several, tied=tied)
    optional = {"base.lm_head.weight"} if tied else set()
    compare_shapes(folder, stored.shapes, _our_shapes(config), optional)
    _refuse_mixed_dtypes(stored, [entry.ours for entry in table])
    written["dtype"] = str(stored.dtype()).removeprefix("torch.")
    return _Plan(stored, table, written, "mnemon", published.model_type, notes)


def _converted(plan: _Plan, to: Target, track: Track) -> Iterator[tuple[str, Tensor]]:
    """Yield what is to be written, reading what it is made of when it is asked for."""
    for entry in track(plan.table):
        if to == "mnemon":
            yield from zip(entry.ours, entry.join([plan.stored.read(name) for name in entry.theirs]), strict=True)
        else:
            yield from zip(entry.theirs, entry.part([plan.stored.read(name) for name in entry.ours]), strict=True)


def _our_shapes(config: MoMConfig) -> dict[str, Shape]:
    with torch.device("meta"):
        model = MoMForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _published_shapes(config: MoMConfig, table: list[Correspondence], tied: bool) -> dict[str, Shape]:
    """Return the shape of every tensor that a published checkpoint of this configuration must have."""
    ours = _our_shapes(config)
    covered = {name for entry in table for name in entry.ours}
    assert covered == ours.keys() - ({"base.lm_head.weight"} if tied else set()), "a tensor of the model is not mapped"
    shapes: dict[str, Shape] = {}
    for entry in table:
        parts = entry.part([torch.empty(ours[name], device="meta") for name in entry.ours])
        shapes |= {name: tuple(part.shape) for name, part in zip(entry.theirs, parts, strict=True)}
    return shapes


def _is_tied(stored: StoredTensors, declared: bool) -> bool:
    """Say whether the head is the embedding; the weights decide where they hold both.

    Published configurations are not to be relied on: one says tied and comes with a head of its own.
    """
    if _HEAD not in stored.shapes:
        return declared
    same = stored.shapes[_HEAD] == stored.shapes.get(_EMBEDDING) and stored.dtypes[_HEAD] == stored.dtypes[_EMBEDDING]
    return same and torch.equal(stored.read(_HEAD), stored.read(_EMBEDDING))


def _refuse_mixed_dtypes(stored: StoredTensors, groups: list[tuple[str, ...]]) -> None:
    for names in groups:
        odd = next((name for name in names if stored.dtypes[name] != stored.dtypes[names[0]]), None)
        if odd is not None:
            dtypes = f"{stored.dtypes[odd]}, {names[0]} {stored.dtypes[names[0]]}"
            raise CheckpointError(f"{stored.folder}: {odd} is {dtypes}; expected one dtype for both")


def _copy_files(folder: Path, target: Path) -> list[str]:
    names = [name for name in (*_TOKENIZER_FILES, *_OTHER_FILES) if (folder / name).is_file()]
    for name in names:
        shutil.copyfile(folder / name, target / name)
    return names
