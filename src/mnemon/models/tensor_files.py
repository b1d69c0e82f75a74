"""Safetensors files tensor by tensor: a checkpoint is read and written without ever being whole in memory."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mnemon.errors import CheckpointError, RunError
from mnemon.files import atomic_write_json

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class StoredTensors:
    """The tensors of a checkpoint folder, one safetensors file or several with an index.

    Attributes:
        folder: the folder.
        shapes: shape of every tensor, by name.
        dtypes: dtype of every tensor, by name.

    Args:
        folder: the folder.
    Raises:
        CheckpointError: if there is no safetensors file, one is missing or damaged, the index names what is not there,
            or a tensor is not of a floating-point type.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        index = _read_index(folder)
        for path in sorted({folder / name for name in index.values()} if index else {folder / SINGLE_FILE}):
            self._add(path)
        for name, file in index.items():
            if self._files.get(name) != folder / file:
                raise CheckpointError(
                    f"{folder / INDEX_FILE} names {name} in {file}, which is not there; fetch it again"
                )

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            CheckpointError: if the file has become unreadable.
        """
        try:
            with safe_open(str(self._files[name]), framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[name]} is damaged or truncated: {error}") from error

    def dtype(self) -> torch.dtype:
        """Return the dtype that most of the numbers have."""
        counts: dict[torch.dtype, int] = {}
        for name, dtype in self.dtypes.items():
            counts[dtype] = counts.get(dtype, 0) + torch.Size(self.shapes[name]).numel()
        return max(counts, key=lambda dtype: counts[dtype])

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{self.folder} lacks {path.name}; fetch the complete checkpoint")
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                    part = file.get_slice(name)
                    if part.get_dtype() not in _FLOATS:
                        raise CheckpointError(
                            f"{path}: {name} is of type {part.get_dtype()}; expected one of {', '.join(_FLOATS)}"
                        )
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), _FLOATS[part.get_dtype()]
                    self._files[name] = path
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or truncated: {error}") from error


def _read_index(folder: Path) -> dict[str, str]:
    """Return which file each tensor is in; empty if there is one file for all.

    Raises:
        CheckpointError: if there is neither an index nor a single file, or the index cannot be used.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        if not (folder / SINGLE_FILE).is_file():
            _refuse_pickles(folder)
            raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; expected a saved model")
        return {}
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read; fetch it again") from error
    names = list(index.values()) if isinstance(index, dict) else []
    # A name with a folder in it could lead out of the checkpoint.
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{path} has no usable weight_map; expected tensor names and file names of this folder")
    return index


def _refuse_pickles(folder: Path) -> None:
    found = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if found:
        raise CheckpointError(
            f"{folder} has {found[0]} and no safetensors; such files can run code when they are read, so they never "
            "are: fetch or save the checkpoint as safetensors"
        )


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors as they come, into one file or, above `shard_bytes`, into several with an index.

    No more than `shard_bytes` and one tensor are held at a time.

    Args:
        folder: an existing folder.
        tensors: names and tensors.
        shard_bytes: most bytes of a file, unless one tensor alone has more.

    Returns:
        How many numbers were written.

    Raises:
        RunError: if the disk is full or the place is not writable.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    numbers = size = total = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            shards.append(_write_shard(folder, len(shards), held))
            held, size = {}, 0
        held[name] = tensor
        size, total, numbers = size + tensor.nbytes, total + tensor.nbytes, numbers + tensor.numel()
    shards.append(_write_shard(folder, len(shards), held))
    if len(shards) == 1:
        (folder / _temporary(0)).rename(folder / SINGLE_FILE)
        return numbers
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / _temporary(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    atomic_write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return numbers


def _temporary(number: int) -> str:
    return f"part-{number}.tmp"  # how many there will be is known at the end only


def _write_shard(folder: Path, number: int, held: dict[str, Tensor]) -> list[str]:
    path = folder / _temporary(number)
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors leaves its files to their owner alone
    except (SafetensorError, OSError) as error:
        raise RunError(f"{folder}: cannot be written ({error}); free some space or choose another place") from error
    return list(held)
