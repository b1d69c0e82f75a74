"""Activations in the form in which EleutherAI's delphi (`eai-delphi`) keeps those of sparse coders.

    FOLDER/latents/HOOKPOINT/config.json
    FOLDER/latents/HOOKPOINT/FIRST_LAST.safetensors     the units FIRST to LAST (inclusive) of the hookpoint:
        locations     uint16 or uint32 [n, 3]: context, place in it, unit - FIRST
        activations   float16 [n]
        tokens        int64 [contexts, context length]: ids of the whole text, the same in every file

A hookpoint is a block. What is not listed is not active. `LatentDataset(raw_dir=FOLDER/latents, ...)` reads it.

Source: format of github.com/EleutherAI/delphi, `delphi/latents/cache.py` and `loader.py`.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from mnemon.errors import ConfigError
from mnemon.files import atomic_write_json, complete_folder
from mnemon.inspection.explain.activations import UnitActivations

CONTEXT_LENGTH = 256
LEAST_ACTIVE = 1e-5
"""Up to here a unit counts as not active, as in delphi."""

_SMALL = 2**16


def export_delphi(
    activations: UnitActivations,
    folder: str | Path,
    context_length: int = CONTEXT_LENGTH,
    num_splits: int = 1,
    least_share: float = 0.0,
    overwrite: bool = False,
) -> Path:
    """Write activations for delphi.

    Args:
        activations: what was recorded.
        folder: folder to make.
        context_length: tokens per context, at least 1; a shorter text is one context. Tokens that do not fill the last
            context are left out, as delphi does.
        num_splits: files per hookpoint, at least 1; there are never more than units.
        least_share: share of a unit's largest activation up to which it counts as not active, in [0, 1). Shares of
            reads are never 0: without a limit, delphi takes every token for an example of every slot.
        overwrite: replace an earlier export.

    Returns:
        The folder `latents`, which delphi calls `raw_dir`.

    Raises:
        ConfigError: a value is out of range, or the folder holds files already.
        RunError: the folder cannot be written.
    """
    for name, number in (("context_length", context_length), ("num_splits", num_splits)):
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}")
    if not 0 <= least_share < 1:
        raise ConfigError(f"least_share must be at least 0 and below 1, got {least_share}")
    length = min(context_length, activations.num_tokens)
    contexts = activations.num_tokens // length
    tokens = activations.ids[: contexts * length].reshape(contexts, length).astype(np.int64)
    with complete_folder(folder, overwrite) as temporary:
        for block in sorted({unit.block for unit in activations.units}):
            home = temporary / "latents" / hookpoint(block, activations.kind)
            home.mkdir(parents=True)
            files = _write_block(home, activations, block, tokens, num_splits, least_share)
            atomic_write_json(home / "config.json", _config(activations.model, tokens, files))
    return Path(folder) / "latents"


def hookpoint(block: int, kind: str) -> str:
    """Name the hookpoint of a block."""
    return f"blocks.{block}.memory.{kind}"


def _write_block(
    home: Path,
    activations: UnitActivations,
    block: int,
    tokens: NDArray[np.int64],
    num_splits: int,
    least_share: float,
) -> int:
    """Write the files of one block; returns how many."""
    columns = [column for column, unit in enumerate(activations.units) if unit.block == block]
    indices = np.array([activations.units[column].index for column in columns])
    values = activations.values[: tokens.size, columns]
    limits = np.maximum(values.max(axis=0).astype(np.float32) * least_share, LEAST_ACTIVE)
    active = values.astype(np.float32) > limits
    width = int(indices.max()) + 1
    bounds = np.unique(np.linspace(0, width, min(num_splits, width) + 1).astype(np.int64))
    for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = active & ((indices >= first) & (indices < end))
        token, column = np.nonzero(own)
        locations = np.stack([*np.divmod(token, tokens.shape[1]), indices[column] - first], axis=1)
        is_small = locations.max(initial=0) < _SMALL
        content = {
            "locations": locations.astype(np.uint16 if is_small else np.uint32),
            "activations": values[token, column].astype(np.float16),
            "tokens": tokens,
        }
        save_file(content, home / f"{first}_{end - 1}.safetensors")
    return len(bounds) - 1


def _config(model: str, tokens: NDArray[np.int64], files: int) -> dict[str, str | int]:
    """Return what delphi keeps beside a cache; the text is no data set, and its tokens are in the files."""
    return {
        "dataset_repo": "",
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": tokens.shape[1],
        "n_tokens": tokens.size,
        "n_splits": files,
        "model_name": model,
    }
