"""Put memories side by side, as the rows of one batch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mnemon.errors import StateError
from mnemon.models.decoder_state import DecoderState
from mnemon.models.state import MemoryState

Entry = tuple[Tensor, ...]


def stack(states: Sequence[MemoryState]) -> MemoryState:
    """Return one state that has the rows of all the states, in their order.

    Memories of texts of different lengths fit together: keys and values of the shorter ones get blank columns.

    Raises:
        StateError: if there is none, if they are of different models or on different devices, or if one memory has
            read nothing and another one holds what only the model could begin (states of linear memories).
    """
    if not states:
        raise StateError("there is no memory to put side by side; give at least one")
    first = states[0]
    for state in states[1:]:
        _refuse_other(first, state)
    bare = [replace(state.without_derived(), decoder=replace(state.decoder, base=())) for state in states]
    held = [iter(state.tensors()) for state in bare]
    joined = bare[0]._map(lambda _: torch.cat([next(tensors) for tensors in held]))
    waiting = [state.pending or ((),) * state.batch_size for state in states]
    pending = tuple(row for rows in waiting for row in rows)
    decoder = _stacked_decoders([state.decoder for state in states])
    return replace(joined, decoder=decoder, pending=pending if any(pending) else ())


def _refuse_other(first: MemoryState, state: MemoryState) -> None:
    if type(state) is not type(first) or len(state.decoder.base) != len(first.decoder.base):
        raise StateError("the memories are of different models; put only memories of one model side by side")
    if first.origin is None or state.origin is None or not first.origin.agrees(state.origin):
        raise StateError("the memories were made by different weights; put only memories of one model side by side")
    if state.device != first.device:
        raise StateError(f"the memories are on {first.device} and on {state.device}; move them with .to(device)")


def _stacked_decoders(parts: Sequence[DecoderState]) -> DecoderState:
    positions = []
    for arrays in zip(*(part.key_positions for part in parts), strict=True):
        width = max(array.shape[1] for array in arrays)
        padded = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=-1) for a in arrays]
        positions.append(np.concatenate(padded))
    base = tuple(_stacked_entries(entries, parts) for entries in zip(*(part.base for part in parts), strict=True))
    return DecoderState(tuple(count for part in parts for count in part.counts), base, tuple(positions))


def _stacked_entries(entries: Sequence[Entry], parts: Sequence[DecoderState]) -> Entry:
    """Join what one block carries in several states (`parts`)."""
    shapes = {tuple(tensor.shape[1:] for tensor in entry) for entry in entries}
    if len(shapes) == 1:
        return tuple(torch.cat(tensors) for tensors in zip(*entries, strict=True))
    if not all(_may_be_keys_and_values(entry, part) for entry, part in zip(entries, parts, strict=True)):
        raise StateError(
            "one memory has read less than a block of tokens and holds nothing yet, so it cannot stand beside the "
            "others; memorize it as a row of one batch with them"
        )
    width = max(map(_width, entries))
    like = next(entry for entry in entries if entry)
    rows = [len(part.counts) for part in parts]
    return tuple(
        torch.cat(
            [_columns(entry[side::2], width, like[side], count) for entry, count in zip(entries, rows, strict=True)]
        )
        for side in (0, 1)
    )


def _may_be_keys_and_values(entry: Entry, part: DecoderState) -> bool:
    """Say whether an entry is keys and values in pieces, or nothing; states of memories have other shapes."""
    widths = {array.shape[1] for array in part.key_positions}
    in_pairs = len(entry) % 2 == 0 and all(tensor.ndim == 4 for tensor in entry)
    return in_pairs and _width(entry) in widths


def _width(entry: Entry) -> int:
    return sum(keys.shape[-2] for keys in entry[0::2])


def _columns(pieces: Sequence[Tensor], width: int, like: Tensor, rows: int) -> Tensor:
    """Return keys or values in one piece of `width` columns, blanks behind, [rows, H, width, d]."""
    blank = like.new_zeros(rows, like.shape[1], width - sum(piece.shape[-2] for piece in pieces), like.shape[3])
    return torch.cat([*pieces, blank], dim=-2)
