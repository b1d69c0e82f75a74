"""Record the memory of RMT and ARMT: how large it is, how much a segment changes it, and which token looks at it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemon.inspection.knock_out import Part
from mnemon.inspection.reading import Reading, Segment
from mnemon.inspection.taps import calls_through
from mnemon.inspection.trace import TokenMemory, column_means
from mnemon.models.memory_token_segments import FramedCall
from mnemon.models.modeling_rmt import RMTForCausalLM
from mnemon.models.state import ARMTState, MemoryCache, MemoryState, RMTState

_TINY = 1e-12


class TokenMemoryRecorder:
    """Watch the memory of an RMT model (a `mnemon.inspection.reading.Recorder`).

    With memory tokens, an entry is the carried state of one token; with associative memories, the matrix of one block.
    After a segment that is not complete, nothing has changed: the norm is as before, and the change is 0.

    `read` is the share of the attention weights of a column's tokens that falls on the memory tokens in front of the
    segment, mean over heads and over blocks with attention. Fused attention does not give its weights away, so every
    segment is read a second time with the library's eager attention, and that answer thrown away.

    Args:
        model: who reads.
        tokenizer: not needed.
        reading: what is read.
        state: what was read before; None = nothing.
    """

    def __init__(
        self, model: RMTForCausalLM, tokenizer: Any, reading: Reading, state: MemoryState | None = None
    ) -> None:
        self.notes: list[str] = []
        self._model, self._reading = model, reading
        self._before: MemoryState = model.initial_state(1) if state is None else state
        count = len(_entries(self._before))
        self._norm, self._change = (np.zeros((reading.num_segments, count)) for _ in range(2))
        is_seen = not model.config.is_associative and any(block.has_keys for block in model.blocks)
        self._read = np.zeros((reading.num_columns, count if is_seen else 0))

    def watch(self, segment: Segment) -> AbstractContextManager[Any]:
        """Return a context that does nothing: all there is to see is in the state and in a second reading."""
        return contextlib.nullcontext()

    def read(self, segment: Segment, state: MemoryState) -> None:
        """Compare the memory after a segment with that before it, and look where the segment's tokens looked."""
        old, new = _entries(self._before), _entries(state)
        norm = new.norm(dim=1)
        self._norm[segment.number] = norm.cpu().numpy()
        self._change[segment.number] = ((new - old).norm(dim=1) / norm.clamp_min(_TINY)).cpu().numpy()
        if self._read.shape[1]:
            self._note_attention(segment)
        self._before = state

    def memory(self) -> TokenMemory:
        """Return what was recorded."""
        count = self._norm.shape[1]
        if self._model.config.is_associative:
            units = tuple(f"memory of block {block}" for block in range(count))
            self.notes.append("associative memories are read by a product, not by attention: no shares of reads")
        else:
            units = tuple(f"memory token {token}" for token in range(count))
        norm, change, read = (x.astype(np.float32) for x in (self._norm, self._change, self._read))
        return TokenMemory(units, norm, change, read)

    def _note_attention(self, segment: Segment) -> None:
        """Read a segment again with attention whose weights can be seen."""
        assert isinstance(self._before, RMTState)
        seen: list[Tensor] = []
        ids = torch.from_numpy(self._reading.ids[segment.tokens.start : segment.tokens.stop])[None]
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(_eager(self._model))
            for block, reach in zip(self._model.blocks, self._model.segmented.reach_index, strict=True):
                if block.attention is not None and reach is not None:
                    look = partial(self._look, seen, len(segment.tokens), self._memory_columns(reach))
                    stack.callback(block.attention.register_forward_hook(look).remove)
            cache = MemoryCache(self._before)
            self._model(input_ids=ids.to(self._model.device), past_key_values=cache, logits_to_keep=1)
        if not seen:
            self._read = self._read[:, :0]
            self.notes.append(
                f"{type(self._model.base).__name__} does not give its attention weights: no shares of reads"
            )
            return
        columns = slice(segment.columns.start, segment.columns.stop)
        starts = self._reading.starts[segment.columns.start : segment.columns.stop + 1] - segment.tokens.start
        self._read[columns] = column_means(torch.stack(seen).mean(dim=0).cpu().numpy(), starts)

    def _memory_columns(self, reach: int) -> tuple[int, list[tuple[int, int]]]:
        """Return how many memory tokens stand before the call's own tokens, and (column, memory token) of all keys."""
        count = self._read.shape[1]
        if self._before.counts[0] % self._model.config.segment_length == 0:
            return count, [(token, token) for token in range(count)]
        positions = self._before.decoder.key_positions[reach][0].tolist()
        return 0, [(column, token) for column, token in enumerate(positions) if 0 <= token < count]

    def _look(
        self,
        seen: list[Tensor],
        tokens: int,
        memory: tuple[int, list[tuple[int, int]]],
        _: Any,
        args: tuple[Any, ...],
        output: Any,
    ) -> None:
        """Take the attention weights [1, H, queries, keys] of one block."""
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            return
        first, columns = memory
        rows = weights[0, :, first : first + tokens].double().mean(dim=0)
        shares = rows.new_zeros(tokens, self._read.shape[1])
        for column, token in columns:
            shares[:, token] = rows[:, column]
        seen.append(shares)


def token_memory_parts(model: RMTForCausalLM) -> list[Part]:
    """Return what can be knocked out of an RMT model: each memory token, or the memory of each block, and all of it.

    A memory token is knocked out by letting every segment find it as the first one does: as it was trained, without
    what was carried. Of an associative memory, the answers are zero. Without all of it, a text's logits are those of
    the model's `knock_out_memory`.
    """
    if model.config.is_associative:
        memories = range(len(model.associative_memories))
        parts = [
            Part("block", f"memory of block {index}", index, None, partial(_unanswered, model, [index]))
            for index in memories
        ]
        return [*parts, Part("all", "all associative memories", None, None, partial(_unanswered, model, memories))]
    tokens = range(model.config.num_memory_tokens)
    parts = [Part("memory", f"memory token {i}", None, i, partial(_as_trained, model, [i])) for i in tokens]
    return [*parts, Part("all", "all memory tokens", None, None, partial(_as_trained, model, tokens))]


@contextlib.contextmanager
def _as_trained(model: RMTForCausalLM, tokens: Sequence[int]) -> Iterator[None]:
    """Let segments find some memory tokens as they were trained."""

    def run(original: Callable[..., Any], embedded: Tensor, call: FramedCall, *others: Any, **options: Any) -> Any:
        trained = model.memory_tokens.weight.to(embedded.dtype)
        source = torch.from_numpy(call.source).to(embedded.device)
        for token in tokens:
            embedded = torch.where((source == token)[..., None], trained[token], embedded)
        return original(embedded, call, *others, **options)

    with calls_through(model.segmented, "run", run):
        yield


@contextlib.contextmanager
def _unanswered(model: RMTForCausalLM, blocks: Sequence[int]) -> Iterator[None]:
    """Let the associative memories of some blocks answer nothing."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(calls_through(model.associative_memories[block], "read", _nothing))
        yield


def _nothing(_: Any, x: Tensor, held: Any) -> Tensor:
    return torch.zeros_like(x)


@contextlib.contextmanager
def _eager(model: RMTForCausalLM) -> Iterator[None]:
    """Let the decoder compute attention in steps, so that its weights can be seen."""
    before = model.base.config._attn_implementation
    model.base.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.base.set_attn_implementation(before)


def _entries(state: MemoryState) -> Tensor:
    """Return the memory of one row, an entry per row of the result, [m, ...], in float32 at least."""
    if isinstance(state, RMTState):
        held = state.memory[0]
    else:
        assert isinstance(state, ARMTState)
        held = torch.stack([association.matrix[0].flatten() for association in state.associations])
    held = held.detach()
    return held if held.dtype == torch.float64 else held.float()
