"""One segment of a decoder with memory tokens: put them around the tokens, run, and carry on what they became.

`run` is a pure function of tokens and state, so that training may recompute it instead of keeping it. Rows of a batch
may stand at different places of their segments, so a call of the decoder holds, row by row,

    [read memory, if a segment begins ; tokens ; write memory, if the segment is complete ; blanks]
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemon.layers.associative_memory import Association, AssociativeMemory
from mnemon.layers.memory_diagnostics import MemoryDiagnostics
from mnemon.layers.memory_tokens import MemoryTokens
from mnemon.models.decoder_state import DecoderState
from mnemon.models.graft import around_blocks, last_hidden_states
from mnemon.models.segmented_decoder import SegmentedDecoder
from mnemon.models.segments import SegmentCall, complete_rows, where_rows
from mnemon.models.state import ARMTState, RMTState


@dataclass(frozen=True)
class FramedCall(SegmentCall):
    """A call with memory tokens around the tokens of every row; positions count within the segment.

    Attributes:
        source: what stands in every column, [B, width]: i < m = memory token i, m + j = token j of `text`.
        before: memory tokens in front of each row's tokens, 0 or m.
        after: memory tokens behind them, 0 or m.
        text: the call without memory tokens.
    """

    source: np.ndarray
    before: np.ndarray
    after: np.ndarray
    text: SegmentCall

    @property
    def writes(self) -> bool:
        """Whether the memory of some row is written."""
        return bool(self.after.any())


class Frame(NamedTuple):
    """How memory tokens stand around a segment.

    Attributes:
        segment_length: tokens C of a whole segment.
        num_tokens: memory tokens m of a group.
        in_front: whether a group stands in front of the segment as well as behind it.
    """

    segment_length: int
    num_tokens: int
    in_front: bool

    def around(self, text: SegmentCall, writes: bool) -> FramedCall:
        """Put memory tokens around a call: in front where a segment begins, behind where one is complete.

        Args:
            text: the call, within one segment of every row.
            writes: whether memory is written at all.
        """
        prefix = self.num_tokens if self.in_front else 0
        place_in_segment = text.starts % self.segment_length
        before = np.where((place_in_segment == 0) & (text.lengths > 0), prefix, 0)
        after = np.where(text.completes, self.num_tokens, 0) if writes else np.zeros_like(before)
        lengths = before + text.lengths + after
        columns = np.arange(int(lengths.max()))[None, :]
        token = columns - before[:, None]
        is_token = (token >= 0) & (token < text.lengths[:, None])
        memory = np.where(token < 0, columns, (token - text.lengths[:, None]).clip(0, self.num_tokens - 1))
        chosen = np.take_along_axis(text.columns, token.clip(0, max(text.width - 1, 0)), axis=1)
        return FramedCall(
            columns=np.where(is_token, chosen, -1),
            lengths=lengths,
            starts=np.where(place_in_segment == 0, 0, prefix + place_in_segment),
            completes=text.completes,
            source=np.where(is_token, self.num_tokens + token, memory),
            before=before,
            after=after,
            text=text,
        )


class _FramedSegments:
    """What both kinds of memory do alike.

    Args:
        decoder: the decoder under the memory.
        tokens: the trained memory tokens.
        knocked_out: whether every segment finds the memory as the first one does.
        keep_pieces: carry keys and values in pieces (for training).
        recomputes: whether the caller recomputes segments in the backward pass.
        diagnostics: takes what the memory does, if anybody asks.
    """

    in_front: bool

    def __init__(
        self,
        decoder: SegmentedDecoder,
        tokens: MemoryTokens,
        knocked_out: bool = False,
        keep_pieces: bool = False,
        recomputes: bool = False,
        diagnostics: MemoryDiagnostics | None = None,
    ) -> None:
        self.decoder = decoder
        self.tokens = tokens
        self.knocked_out = knocked_out
        self.keep_pieces = keep_pieces
        self.recomputes = recomputes
        self.diagnostics = diagnostics

    def frame(self, call: SegmentCall, writes: bool) -> FramedCall:
        """Return the call as the decoder makes it."""
        frame = Frame(self.decoder.segment_length, len(self.tokens.weight), self.in_front)
        return frame.around(call, writes and not self.knocked_out)

    def _note_change(self, block: int | None, old: Tensor, new: Tensor, complete: Tensor | None) -> None:
        if self.diagnostics is not None:
            self.diagnostics.add_change(block, old, new, complete)

    def _run(
        self, inputs: Tensor, memory: Tensor, call: FramedCall, state: DecoderState, slots: np.ndarray
    ) -> tuple[Tensor, DecoderState]:
        """Run one call of the decoder; what it carries of a complete segment is forgotten."""
        embedded = self._embedded(inputs, memory, call)
        logits, state = self.decoder.run(embedded, call, state, slots, self.keep_pieces, self.recomputes)
        counts = call.text.starts + call.text.lengths
        state = replace(state, counts=tuple(int(count) for count in counts))
        return logits, state.without(counts % self.decoder.segment_length == 0)

    def _embedded(self, inputs: Tensor, memory: Tensor, call: FramedCall) -> Tensor:
        """Return the input embeddings of a call, [B, width, D]: of its tokens, and memory [B, m, D] around them."""
        tokens = self.decoder.base.get_input_embeddings()(inputs) if inputs.ndim == 2 else inputs
        memory = memory.to(tokens.dtype)
        if call.is_uniform:
            front, behind = ([memory] if group[0] else [] for group in (call.before, call.after))
            return torch.cat([*front, tokens, *behind], dim=1)
        return _pick(torch.cat([memory, tokens], dim=1), call.source)

    def _written(self, hidden: Tensor, call: FramedCall) -> Tensor:
        """Return the states [B, m, D] of the memory tokens behind each row's tokens; anything in rows without."""
        count = len(self.tokens.weight)
        if call.is_uniform:
            return hidden[:, -count:].clone()  # what is carried must not hold on to the states of the whole segment
        first = (call.lengths - call.after)[:, None]
        return _pick(hidden, (first + np.arange(count)[None, :]).clip(max=call.width - 1))


class TokenSegments(_FramedSegments):
    """RMT: the states of the memory tokens behind a segment are the memory tokens of the next.

        [R ; Y ; W] = decoder([H ; X ; H]);   H <- W

    Source: Recurrent Memory Transformer, arXiv:2207.06881, section 3.
    """

    in_front = True

    def run(
        self, inputs: Tensor, call: FramedCall, state: RMTState, slots: np.ndarray, writes: bool
    ) -> tuple[Tensor, RMTState]:
        """Run one call of the decoder, within one segment of every row.

        Args:
            inputs: the call's tokens [B, width of its text] or embeddings [B, width of its text, D].
            call: which tokens these are, and the memory tokens around them.
            state: what earlier calls left; not changed.
            slots: columns of the call to compute logits for.
            writes: whether anybody carries on from the new state (`call` says what is written).
        Returns:
            Logits [B, len(slots), V] and the new state.
        """
        with last_hidden_states(self.decoder.base) as hidden:
            logits, decoder = self._run(inputs, state.memory, call, state.decoder, slots)
        state = replace(state, decoder=decoder)
        if not (call.writes or self.knocked_out) or not call.completes.any():
            return logits, state
        new = self._written(hidden[-1], call) if call.writes else self.tokens.rows(state.batch_size)
        new, complete = new.to(state.memory.dtype), complete_rows(call, new.device)
        self._note_change(None, state.memory, new, complete)
        return logits, replace(state, memory=where_rows(complete, new, state.memory))


class AssociativeSegments(_FramedSegments):
    """ARMT: memory tokens behind a segment are the same in every one; what becomes of them is written block by block.

    Args:
        memories: the associative memory of every block.
        *others: see `_FramedSegments`.
    Source:
        Associative Recurrent Memory Transformer, arXiv:2407.04841.
    """

    in_front = False

    def __init__(self, memories: list[AssociativeMemory], *others: Any, **options: Any) -> None:
        super().__init__(*others, **options)
        self.memories = memories

    def run(
        self, inputs: Tensor, call: FramedCall, state: ARMTState, slots: np.ndarray, writes: bool
    ) -> tuple[Tensor, ARMTState]:
        """Run one call of the decoder, within one segment of every row (arguments as in `TokenSegments.run`)."""
        written: list[Tensor] = []
        with self._attached(call, state, written):
            logits, decoder = self._run(inputs, self.tokens.rows(state.batch_size), call, state.decoder, slots)
        state = replace(state, decoder=decoder)
        return logits, replace(state, associations=tuple(self._updated(call, state, written))) if written else state

    def _attached(self, call: FramedCall, state: ARMTState, written: list[Tensor]) -> Any:
        """Attach the memories for one call; as a side effect every block notes in `written` what it would write."""
        if self.knocked_out:
            return contextlib.nullcontext()
        is_empty = bool((call.text.starts < self.decoder.segment_length).all())  # every row is in its first segment

        def read(index: int, hidden: Tensor) -> Tensor:
            if is_empty:  # it would answer 0
                return hidden
            return hidden + self.memories[index].read(hidden, state.associations[index])

        def note(_: int, hidden: Tensor) -> None:
            written.append(self._written(hidden, call))

        return around_blocks(self.decoder.blocks, read, note if call.writes else None)

    def _updated(self, call: FramedCall, state: ARMTState, written: list[Tensor]) -> Iterator[Association]:
        complete = complete_rows(call, written[0].device)
        for index, (held, tokens) in enumerate(zip(state.associations, written, strict=True)):
            new = self.memories[index].write(tokens, held)
            self._note_change(index, held.matrix, new.matrix, complete)
            yield Association(*(where_rows(complete, after, before) for after, before in zip(new, held, strict=True)))


def _pick(tensor: Tensor, columns: np.ndarray) -> Tensor:
    """Pick columns [B, n] of a tensor [B, T, D], row by row."""
    index = torch.from_numpy(columns).to(tensor.device)
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))
