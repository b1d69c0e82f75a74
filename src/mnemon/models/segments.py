"""Cut a batch of ragged rows into calls of the decoder that end at segment boundaries.

Segments are counted per row in real tokens, so rows with padding reach their boundaries at different columns. Each
call takes from every row as many tokens as still fit into its running segment, moved to the front of the call (blank
columns follow). After the first call every row that has tokens left stands at a boundary, so all later calls are full
segments; a call may then take several of them, where the memory does not need the decoder to stop after each.
Everything here runs on the host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mnemon.errors import ShapeError


@dataclass(frozen=True)
class SegmentCall:
    """One call of the decoder.

    Attributes:
        columns: input column of every token, [B, width]; -1 where the call is blank.
        lengths: tokens of every row in this call; blanks follow them.
        starts: real tokens each row had read before this call.
        completes: whether a row's segment is complete after this call.
    """

    columns: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    completes: np.ndarray

    @cached_property
    def width(self) -> int:
        """Columns of the call."""
        return int(self.columns.shape[1])

    @cached_property
    def is_dense(self) -> bool:
        """Whether no column is blank."""
        return bool((self.lengths == self.width).all())

    @cached_property
    def is_uniform(self) -> bool:
        """Whether the call is dense and all rows take the same columns from the same position."""
        same_columns = bool((self.columns == self.columns[:1]).all())
        return self.is_dense and same_columns and bool((self.starts == self.starts[0]).all())

    @cached_property
    def positions(self) -> np.ndarray:
        """Position of every token in its row (real tokens before it), [B, width]; blanks repeat the last one."""
        offsets = np.minimum(np.arange(self.width)[None, :], np.maximum(self.lengths - 1, 0)[:, None])
        return self.starts[:, None] + offsets

    def segments(self, segment_length: int) -> "list[SegmentCall]":
        """Return the parts of the call that lie within one segment of every row, in order."""
        if self.width <= segment_length:
            return [self]
        parts = []
        for first in range(0, self.width, segment_length):
            lengths = np.clip(self.lengths - first, 0, segment_length)
            starts = self.starts + np.minimum(self.lengths, first)
            completes = (lengths > 0) & ((starts + lengths) % segment_length == 0)
            parts.append(SegmentCall(self.columns[:, first : first + segment_length], lengths, starts, completes))
        return parts


def count_calls(
    mask: np.ndarray | None, width: int, counts: Sequence[int], segment_length: int, at_once: int = 1
) -> int:
    """Return how many calls `plan_calls` makes."""
    real = np.full(len(counts), width) if mask is None else mask.sum(axis=1)
    begun = np.where(real > 0, np.asarray(counts, dtype=np.int64) % segment_length, 0)
    first = np.where(begun.any(), segment_length - begun, 0)  # a call of its own, up to the next boundary
    later = -(-np.maximum(real - first, 0) // (at_once * segment_length))
    return int(bool(begun.any())) + int(later.max())


def plan_calls(
    mask: np.ndarray | None, width: int, counts: Sequence[int], segment_length: int, at_once: int = 1
) -> Iterator[SegmentCall]:
    """Cut an input of `width` columns into calls, one at a time (a long input is never laid out as a whole).

    Args:
        mask: True where a token is real, [B, width]; None = everywhere.
        width: columns of the input.
        counts: real tokens every row has read before.
        segment_length: tokens C per segment.
        at_once: segments that a call may take of rows which all stand at a boundary.
    """
    batch = len(counts)
    real = None if mask is None else [np.flatnonzero(row) for row in mask]
    position = np.array(counts, dtype=np.int64)
    taken = np.zeros(batch, dtype=np.int64)
    remaining = np.array([width if real is None else len(real[row]) for row in range(batch)], dtype=np.int64)
    while remaining.any():
        left = segment_length - position % segment_length
        if (left[remaining > 0] == segment_length).all():
            left = left + (at_once - 1) * segment_length
        lengths = np.minimum(remaining, left)
        columns = np.full((batch, int(lengths.max())), -1, dtype=np.int64)
        for row, length in enumerate(lengths):
            first = taken[row]
            columns[row, :length] = np.arange(first, first + length) if real is None else real[row][first:][:length]
        completes = (lengths > 0) & ((position + lengths) % segment_length == 0)
        yield SegmentCall(columns, lengths, position.copy(), completes)
        position, taken, remaining = position + lengths, taken + lengths, remaining - lengths


def host_mask(attention_mask: Tensor | None, batch_size: int, width: int) -> np.ndarray | None:
    """Bring the last `width` columns of a padding mask to the host; None when every token is real.

    Raises:
        ShapeError: for a mask that is not [B, columns >= width].
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < width:
        raise ShapeError(
            f"attention_mask must be [{batch_size}, {width}] (or longer, for earlier tokens), got "
            f"{list(attention_mask.shape)}; pass a padding mask, not a prepared attention matrix"
        )
    mask = attention_mask[:, -width:].to("cpu").numpy().astype(bool)
    return None if mask.all() else mask


def gather_columns(tensor: Tensor, call: SegmentCall) -> Tensor:
    """Pick the call's columns from `tensor` [B, T, ...]; blank columns repeat column 0."""
    if call.is_uniform and call.width and (np.diff(call.columns[0]) == 1).all():
        first = int(call.columns[0, 0])
        return tensor[:, first : first + call.width]
    index = torch.from_numpy(call.columns.clip(min=0)).to(tensor.device)
    if tensor.ndim == 3:
        index = index[..., None].expand(-1, -1, tensor.shape[-1])
    return tensor.gather(1, index)


def complete_rows(call: SegmentCall, device: torch.device) -> Tensor | None:
    """Return which rows' segments are complete after a call, [B]; None = all."""
    return None if call.completes.all() else torch.from_numpy(call.completes).to(device)


def where_rows(condition: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """Choose rows of `new` where `condition` [B] holds; None = everywhere."""
    return new if condition is None else torch.where(condition.view(-1, *[1] * (new.ndim - 1)), new, old)


class ColumnCollector:
    """Gather what the calls computed for chosen input columns, and put it in the input's order.

    Args:
        batch_size: rows B.
        width: columns of the input.
        wanted: the input columns to keep, in the order of the result; None = all.
    """

    def __init__(self, batch_size: int, width: int, wanted: np.ndarray | None) -> None:
        self.place = np.full(width, -1, dtype=np.int64)  # column -> where it goes in the result
        kept = np.arange(width) if wanted is None else wanted
        self.place[kept] = np.arange(len(kept))
        self.repeats = None if wanted is None else self.place[wanted]  # a column may be asked for twice
        self.source = np.zeros((batch_size, len(kept)), dtype=np.int64)
        self.pieces: list[Tensor] = []
        self.offset = 0

    def slots(self, call: SegmentCall) -> np.ndarray:
        """Return the call's columns that hold a wanted token in at least one row."""
        wanted = (call.columns >= 0) & (self.place[call.columns] >= 0)
        return np.flatnonzero(wanted.any(axis=0))

    def add(self, piece: Tensor, call: SegmentCall, slots: np.ndarray) -> None:
        """Take the outputs [B, len(slots), ...] of a call for its columns `slots`."""
        columns = call.columns[:, slots]
        target = np.where(columns >= 0, self.place[columns], -1)
        rows, order = np.nonzero(target >= 0)
        self.source[rows, target[rows, order]] = self.offset + order
        self.pieces.append(piece)
        self.offset += len(slots)

    def result(self) -> Tensor:
        """Return the outputs in the order of the wanted columns, [B, wanted, ...]; masked columns are undefined."""
        joined = torch.cat(self.pieces, dim=1) if len(self.pieces) > 1 else self.pieces[0]
        source = self.source if self.repeats is None else self.source[:, self.repeats]
        if joined.shape[1] == source.shape[1] and (source == np.arange(source.shape[1])).all():
            return joined
        index = torch.from_numpy(source).to(joined.device)[..., None].expand(-1, -1, joined.shape[-1])
        return joined.gather(1, index)
