"""A memory as a file: what a model remembers of a text, and which model and tokenizer it is of.

    NAME.memory.safetensors      every tensor of the state, and in its header
                                 - kind and version of the format, the library's version, a checksum per tensor
                                 - class, family and fingerprint of the model; fingerprint of the tokenizer
                                 - tokens read; ids of those that wait for a whole block

The layout is that of `mnemon.typed_files`. No model is needed to read a file; using the memory in another model than
the one that made it is refused by that model (`mnemon.models.provenance`).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemon.errors import DataError, StateError
from mnemon.layers.associative_memory import Association
from mnemon.layers.memory_bank import WriteStatistics
from mnemon.models.decoder_state import DecoderState
from mnemon.models.provenance import SHOWN, Origin, check_origin, model_fingerprint
from mnemon.models.state import ARMTState, LM2State, MemoryState, RMTState
from mnemon.typed_files import FileFormat, read_typed, write_typed

MEMORY = FileFormat("mnemon memory", version=1)


@dataclass(frozen=True)
class StoredDecoder:
    """What the decoder carries (`DecoderState`)."""

    counts: tuple[int, ...]
    base: tuple[tuple[Tensor, ...], ...]
    key_positions: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class StoredMemory:
    """Content of the file.

    Attributes:
        family: "lm2", "mom" or "rmt".
        model_class: class of the model that made the memory.
        fingerprint: of that model (`mnemon.models.provenance.model_fingerprint`).
        tokenizer: of the tokenizer that made the tokens, where it is known (`tokenizer_fingerprint`).
        tokens_read: tokens of every row, those included that wait.
        decoder, pending: see `MemoryState`.
        bank, kept, statistics: of an LM2 model (`LM2State`).
        memory: of an RMT model (`RMTState`).
        associations: of an RMT model with associative memories (`ARMTState`).
    """

    family: str
    model_class: str
    fingerprint: str
    tokenizer: str | None
    tokens_read: tuple[int, ...]
    decoder: StoredDecoder
    pending: tuple[tuple[int, ...], ...]
    bank: Tensor | None = None
    kept: Tensor | None = None
    statistics: tuple[WriteStatistics, ...] | None = None
    memory: Tensor | None = None
    associations: tuple[Association, ...] | None = None


def save_memory(state: MemoryState, path: str | Path, tokenizer: Any = None, overwrite: bool = False) -> Path:
    """Write a memory (see `MemoryState.save`)."""
    origin = state.origin
    if origin is None:
        raise StateError("the memory does not say which model made it; take one from memorize, forward or a file")
    known = _fingerprint_to_write(origin)
    if tokenizer is not None:
        check_tokenizer(state, tokenizer)
    decoder = StoredDecoder(state.counts, state.decoder.base, state.decoder.key_positions)
    own = {
        name: getattr(state, name)
        for name in ("bank", "kept", "statistics", "memory", "associations")
        if hasattr(state, name)
    }
    content = StoredMemory(
        origin.family,
        origin.model_class,
        known,
        origin.tokenizer if tokenizer is None else tokenizer_fingerprint(tokenizer),
        state.tokens_read,
        decoder,
        state.pending,
        **own,
    )
    return write_typed(path, content, MEMORY, overwrite)


def load_memory(path: str | Path, device: torch.device | str = "cpu") -> MemoryState:
    """Read a memory (see `MemoryState.load`)."""
    stored = read_typed(path, StoredMemory, MEMORY)
    positions = tuple(np.asarray(array, dtype=np.int64) for array in stored.decoder.key_positions)
    decoder = DecoderState(stored.decoder.counts, stored.decoder.base, positions)
    origin = Origin(stored.model_class, stored.family, stored.fingerprint, stored.tokenizer)
    common: dict[str, Any] = {"decoder": decoder, "pending": stored.pending, "origin": origin}
    state: MemoryState
    if stored.bank is not None and stored.kept is not None and stored.statistics is not None:
        state = LM2State(bank=stored.bank, kept=stored.kept, statistics=stored.statistics, **common)
    elif stored.memory is not None:
        state = RMTState(memory=stored.memory, **common)
    elif stored.associations is not None:
        state = ARMTState(associations=stored.associations, **common)
    else:
        state = MemoryState(**common)
    if state.tokens_read != stored.tokens_read:
        raise DataError(
            f"{path}: says {stored.tokens_read} tokens and holds {state.tokens_read}; memorize the text again"
        )
    return state if torch.device(device).type == "cpu" else state.to(device)


def check_tokenizer(state: MemoryState, tokenizer: Any) -> None:
    """Refuse a tokenizer that is not the one a memory was made with; a memory that does not say is believed.

    Raises:
        StateError: naming both fingerprints.
    """
    wanted = None if state.origin is None else state.origin.tokenizer
    found = tokenizer_fingerprint(tokenizer)
    if wanted is not None and wanted != found:
        raise StateError(
            f"the memory was made with another tokenizer: {wanted[:SHOWN]}, this is {found[:SHOWN]}; use the one of "
            "the model that made it, or memorize the text again"
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of what decides how a text becomes token ids: vocabulary, merges, normalisation, added tokens.

    How a call pads and truncates, chat templates and names of special tokens are no part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _fingerprint_to_write(origin: Origin) -> str:
    """Return the fingerprint of the model that made a state.

    Raises:
        StateError: if it has changed since, or is gone and was never asked for its fingerprint.
    """
    if origin.model is not None:
        check_origin(origin, origin.model, weights=True)
        return model_fingerprint(origin.model)
    if origin.fingerprint is None:
        raise StateError(
            "the model that made the memory is gone, so its file could not name it; save while it is there"
        )
    return origin.fingerprint
