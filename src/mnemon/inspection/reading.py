"""Read a text once, segment by segment, while recorders watch the model from outside.

A *segment* here is what one call of the model reads: for LM2 and RMT a segment of the model (after which its memory is
updated), for a model without segments of its own a stretch of fixed length. Between two calls nothing but the state is
kept, so the length of a text is no matter of memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mnemon.errors import ShapeError
from mnemon.inspection.trace import Integers, group_columns
from mnemon.models.memory_model import MemoryModel
from mnemon.models.state import MemoryCache, MemoryState

_LONGEST_STRETCH = 256
_FEWEST_STRETCHES = 16
_SHORTEST_STRETCH = 16


@dataclass(frozen=True)
class Reading:
    """Which tokens are read, and how they are cut.

    Attributes:
        ids: token ids, int64 [T].
        starts: first token of every column, and T, [N + 1].
        segments: first column of every segment, and N, [S + 1].
        complete: whether the last segment is complete, so that the memory is updated after it.
    """

    ids: Integers
    starts: Integers
    segments: Integers
    complete: bool

    @property
    def num_tokens(self) -> int:
        """Tokens T."""
        return len(self.ids)

    @property
    def num_columns(self) -> int:
        """Columns N."""
        return len(self.starts) - 1

    @property
    def num_segments(self) -> int:
        """Segments S."""
        return len(self.segments) - 1

    @cached_property
    def column_of(self) -> Integers:
        """Column of every token, [T]."""
        return np.repeat(np.arange(self.num_columns), np.diff(self.starts))

    def segment(self, number: int) -> "Segment":
        """Return one segment."""
        columns = range(int(self.segments[number]), int(self.segments[number + 1]))
        tokens = range(int(self.starts[columns.start]), int(self.starts[columns.stop]))
        is_last = number + 1 == self.num_segments
        return Segment(number, tokens, columns, self.complete or not is_last)


class Segment(NamedTuple):
    """One segment of a reading.

    Attributes:
        number: its number.
        tokens: its tokens, as numbers in the text.
        columns: its columns.
        complete: whether the memory is updated after it.
    """

    number: int
    tokens: range
    columns: range
    complete: bool


class Recorder(Protocol):
    """Watches a model from outside.

    For every segment, in order, a reading does

        with recorder.watch(segment):
            one call of the model, with one row, on exactly the tokens of the segment
        recorder.read(segment, state after it)

    so that hooks live only inside `watch` and see one call (the model cuts it no further), and `read` turns what they
    saw into columns. What else the reading needs of the model (predictions without memory) is never watched.

    Attributes:
        notes: what was grouped or left out, in words.
    """

    notes: list[str]

    def watch(self, segment: Segment) -> AbstractContextManager[Any]:
        """Return a context in which the model is watched."""

    def read(self, segment: Segment, state: MemoryState) -> None:
        """Take what was seen of a segment; `state` is the model's state after it."""


def plan_reading(model: MemoryModel, ids: Sequence[int], most_columns: int, state: MemoryState | None) -> Reading:
    """Cut a text where the model updates its memory (or every few tokens), and into columns.

    Args:
        model: who reads.
        ids: token ids, at least one.
        most_columns: columns wanted at most; there are never fewer than segments.
        state: what was read before; None = nothing.

    Raises:
        ShapeError: there is no token.
    """
    if not len(ids):
        raise ShapeError("there is nothing to read: expected at least one token")
    length = segment_length(model, len(ids))
    read = 0 if state is None else state.counts[0]
    first = min(length - read % length, len(ids))
    rest = len(ids) - first
    lengths = [first, *[length] * (rest // length), *([rest % length] if rest % length else [])]
    starts, segments = group_columns(lengths, most_columns)
    return Reading(np.asarray(ids, dtype=np.int64), starts, segments, (read + len(ids)) % length == 0)


def segment_length(model: MemoryModel, num_tokens: int) -> int:
    """Return the model's segment length; a power of two, shorter for shorter texts, for a model without segments."""
    own = getattr(model.config, "segment_length", None)
    if own is not None:
        return int(own)
    stretch = _LONGEST_STRETCH
    while stretch > _SHORTEST_STRETCH and num_tokens < stretch * _FEWEST_STRETCHES:
        stretch //= 2
    return stretch


def read_segments(
    model: MemoryModel,
    reading: Reading,
    recorders: Sequence[Recorder],
    state: MemoryState | None = None,
    logits_to_keep: int = 0,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **options: Any,
) -> Iterator[tuple[Segment, Tensor, MemoryState]]:
    """Read a text segment by segment.

    Args:
        model: who reads, in evaluation mode.
        reading: what is read.
        recorders: who watches.
        state: what was read before; None = nothing. It is not changed.
        logits_to_keep: last tokens of every segment whose logits are wanted; 0 = all.
        around: returns a context that every call is made in.
        **options: of the model's `forward`.

    Yields:
        Every segment, its logits [its tokens, vocabulary], and the state after it.
    """
    cache = MemoryCache(state)
    for number in range(reading.num_segments):
        segment = reading.segment(number)
        ids = torch.from_numpy(reading.ids[segment.tokens.start : segment.tokens.stop])[None].to(model.device)
        with torch.no_grad(), around(), ExitStack() as stack:
            for recorder in recorders:
                stack.enter_context(recorder.watch(segment))
            output = model(input_ids=ids, past_key_values=cache, logits_to_keep=logits_to_keep, **options)
        after = cache.state
        assert after is not None
        for recorder in recorders:
            recorder.read(segment, after)
        yield segment, output.logits[0], after
