"""Record what the memory banks of an LM2 model do: who reads which slot, what is written where, what is kept.

The recorder wraps `read`, `gather` and `update` of every bank for the duration of one call, so it sees the very tensors
the model works with and changes none of them. Of a segment it keeps columns; of the tokens, the read queries until the
segment is over, because the paper's Figure 6 asks the updated bank with them again.

Source: LM2: Large Memory Models, arXiv:2502.06049, section 4 and Figure 6.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mnemon.inspection.reading import Reading, Segment, read_segments
from mnemon.inspection.taps import calls_through
from mnemon.inspection.trace import BankBlock, Floats, Integers, column_means
from mnemon.layers.memory_bank import (
    GateValues,
    MemoryBank,
    ReadResult,
    SegmentRead,
    WriteStatistics,
    rms_normalise,
    state_dtype,
)
from mnemon.layers.memory_diagnostics import written_share
from mnemon.models.graft import decoder_of
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.state import LM2State, MemoryState

_FEW_WORDS = 5
_MOST_LOOK_UPS = 16
_TINY = 1e-12


class BankRecorder:
    """A `mnemon.inspection.reading.Recorder` for every memory bank of a model.

    Args:
        model: who reads, with at least one bank.
        tokenizer: its tokenizer, for the nearest words.
        reading: what is read.
        state: what was read before; None = nothing.
        slots: the slots to keep of every bank, in block order; None = all.
        look_ups: segments at most after which the nearest words are looked up.
        precision: what shares and gates are kept in.
    """

    def __init__(
        self,
        model: LM2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        reading: Reading,
        state: LM2State | None = None,
        slots: Sequence[Integers] | None = None,
        look_ups: int = _MOST_LOOK_UPS,
        precision: Any = np.float16,
    ) -> None:
        self._model = model
        self._is_depth = model.config.flow == "depth"
        start = model.initial_state(1) if state is None else state
        # Of every bank: what stands, how much of the initial bank is left in it, and what is left of what stood when
        # the running segment began; of every slot the share left by a segment, summed over segments.
        self._standing = list(start.bank.unbind(1))
        self._kept = list(start.kept.unbind(1))
        every = np.arange(model.config.num_slots)
        self._blocks = [
            _BlockColumns(reading, every if slots is None else slots[order], precision)
            for order in range(len(model.banks))
        ]
        self._running: list[Tensor] = []
        self._left: Floats = np.zeros((len(self._standing), model.config.num_slots))
        self._num_updates = 0
        self._words = SlotWords(model, tokenizer)
        self._look_ups = look_up_segments(reading, look_ups, state is not None)
        self.notes: list[str] = []
        if slots is not None:
            self.notes.append(f"of {model.config.num_slots} slots, the {len(slots[0])} that are read most are shown")
        self._queries: list[Tensor] = []

    @contextmanager
    def watch(self, segment: Segment) -> Iterator[None]:
        """Watch one call of the model on one segment."""
        self._queries = []
        self._running = list(self._standing)
        initial = self._model.initial_memory
        shares = [written_share(bank, kept, initial)[0] for bank, kept in zip(self._standing, self._kept, strict=True)]
        with ExitStack() as stack:
            for order, bank in enumerate(self._model.banks):
                share = shares[self._layer(order)]
                stack.enter_context(calls_through(bank, "read", partial(self._see_read, order, segment, share)))
                stack.enter_context(calls_through(bank, "gather", partial(self._see_gather, order, segment)))
                stack.enter_context(calls_through(bank, "update", partial(self._see_update, order, segment)))
            yield

    def read(self, segment: Segment, state: MemoryState) -> None:
        """Ask the bank after the segment what its tokens asked the bank before it; look up words."""
        assert isinstance(state, LM2State)
        if segment.number == 0 and -1 in self._look_ups:
            self._look_up()
        if not segment.complete:
            return
        self._num_updates += 1
        for layer, (left, held) in enumerate(zip(self._running, self._standing, strict=True)):
            share = left.norm(dim=-1) / held.norm(dim=-1).clamp_min(_TINY)
            self._left[layer] += share[0].cpu().numpy()
        self._standing = list(state.bank.unbind(1))
        with torch.no_grad():
            for order, bank in enumerate(self._model.banks):
                updated = bank.open_segment(rms_normalise(self._standing[self._layer(order)]))
                weights = mean_read_weights(bank, self._queries[order], updated)
                self._blocks[order].put_means("read_after", segment, weights)
        if segment.number in self._look_ups:
            self._look_up()

    def blocks(self) -> tuple[BankBlock, ...]:
        """Return what was recorded, block by block.

        The half-life is that of the bank, counted in segments. Over one segment a slot keeps r = |F * M| / |M| of its
        content M, where F is its forget gate: in flow `layer` that of the block, in flow `depth` the product of the
        gates of all blocks, because the one bank runs through them all. With the mean r over all complete segments, the
        half-life is log(1/2) / log(r): infinite for r = 1, 0 for r = 0, NaN if no segment was complete.
        """
        mean_left = self._left / self._num_updates if self._num_updates else np.full_like(self._left, np.nan)
        return tuple(
            BankBlock(
                block=int(block),
                slots=columns.slots.astype(np.int32),
                half_life=half_life(mean_left[self._layer(order), columns.slots]),
                word_segments=np.array(self._look_ups, dtype=np.int32),
                words=tuple(columns.words),
                word_scores=np.array(columns.word_scores, dtype=np.float32).reshape(
                    len(columns.words), len(columns.slots), self._words.few
                ),
                **columns.arrays,
            )
            for order, (block, columns) in enumerate(zip(self._model.memory, self._blocks, strict=True))
        )

    def _layer(self, order: int) -> int:
        return 0 if self._is_depth else order

    def _see_read(
        self, order: int, segment: Segment, share: Tensor, read: Any, x: Tensor, bank: SegmentRead, **options: Any
    ) -> ReadResult:
        result: ReadResult = read(x, bank, **options)
        with torch.no_grad():
            module = self._model.banks[order]
            self._queries.append(module.read_queries(x))
            weights = mean_read_weights(module, self._queries[order], bank)
            columns = self._blocks[order]
            columns.put_means("read", segment, weights)
            columns.put_means("read_on_written", segment, weights @ share.to(weights.dtype), every_slot=False)
            columns.put_means("output_gate", segment, result.output_gate[0].mean(dim=-1), every_slot=False)
        return result

    def _see_gather(
        self,
        order: int,
        segment: Segment,
        gather: Any,
        residual: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        bank: SegmentRead,
        past: WriteStatistics,
        *others: Any,
    ) -> WriteStatistics:
        statistics: WriteStatistics = gather(residual, positions, valid, bank, past, *others)
        with torch.no_grad():
            shares = self._model.banks[order].write_shares(residual, positions, bank, past, statistics)
            self._blocks[order].put_sums("write", segment, shares[0].mean(dim=0).T)
        return statistics

    def _see_update(
        self, order: int, segment: Segment, update: Any, bank: Tensor, statistics: WriteStatistics
    ) -> tuple[Tensor, GateValues]:
        updated: Tensor
        gates: GateValues
        updated, gates = update(bank, statistics)
        layer = self._layer(order)
        with torch.no_grad():
            self._running[layer] = self._running[layer] * gates.forget_gate
            self._kept[layer] = self._kept[layer] * gates.forget_gate
            share = written_share(updated, self._kept[layer], self._model.initial_memory)
            change = (updated - bank).norm(dim=-1) / updated.norm(dim=-1).clamp_min(_TINY)
            columns = self._blocks[order]
            columns.put_segment("input_gate", segment, gates.input_gate[0].mean(dim=-1))
            columns.put_segment("forget_gate", segment, gates.forget_gate[0].mean(dim=-1))
            columns.put_segment("written_share", segment, share[0])
            columns.put_segment("change", segment, change[0])
        return updated, gates

    def _look_up(self) -> None:
        for order, columns in enumerate(self._blocks):
            slots = torch.from_numpy(columns.slots).to(self._standing[0].device)
            words, scores = self._words.nearest(order, self._standing[self._layer(order)][0, slots])
            columns.words.append(words)
            columns.word_scores.append(scores)


class _BlockColumns:
    """The arrays of one block, filled segment by segment."""

    def __init__(self, reading: Reading, slots: Integers, precision: Any) -> None:
        self.reading = reading
        self.slots = slots
        columns, segments = reading.num_columns, reading.num_segments
        shapes: dict[str, tuple[int, ...]] = {name: (columns, len(slots)) for name in ("read", "read_after", "write")}
        shapes |= dict.fromkeys(("output_gate", "read_on_written"), (columns,))
        shapes |= {name: (segments, len(slots)) for name in ("input_gate", "forget_gate", "written_share", "change")}
        self.arrays: dict[str, Any] = {name: np.full(shape, np.nan, precision) for name, shape in shapes.items()}
        # A ratio, which may be of any size.
        self.arrays["change"] = self.arrays["change"].astype(np.promote_types(precision, np.float32))
        self.words: list[tuple[tuple[str, ...], ...]] = []
        self.word_scores: list[Floats] = []

    def put_means(self, name: str, segment: Segment, values: Tensor, every_slot: bool = True) -> None:
        """Put the columns' means of values per token [T, J], or [T] where they are not of slots."""
        values = values[:, torch.from_numpy(self.slots).to(values.device)] if every_slot else values
        means = column_means(values.double().cpu().numpy(), self._starts(segment))
        self.arrays[name][segment.columns.start : segment.columns.stop] = means

    def put_sums(self, name: str, segment: Segment, values: Tensor) -> None:
        """Put the columns' sums of values per token, [T, J]."""
        values = values[:, torch.from_numpy(self.slots).to(values.device)]
        sums = np.add.reduceat(values.double().cpu().numpy(), self._starts(segment)[:-1], axis=0)
        self.arrays[name][segment.columns.start : segment.columns.stop] = sums

    def put_segment(self, name: str, segment: Segment, values: Tensor) -> None:
        """Put one number per slot, [J]."""
        self.arrays[name][segment.number] = values.double().cpu().numpy()[self.slots]

    def _starts(self, segment: Segment) -> Integers:
        starts = self.reading.starts[segment.columns.start : segment.columns.stop + 1]
        return np.asarray(starts - segment.tokens.start)


class SlotWords:
    """The vocabulary words nearest to what a slot would add to the residual stream.

        logits(slot) = head(norm(W_O W_V rms_normalise(slot)))

    with the value and output projections of one block's bank, and the norm and the head of the decoder. The output gate
    is left out, because it depends on the other slots that are read; so are the blocks above.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        few: words per slot.
    """

    def __init__(self, model: LM2ForCausalLM, tokenizer: PreTrainedTokenizerBase, few: int = _FEW_WORDS) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.few = min(few, model.config.vocab_size)
        self.norm = final_norm(model.segmented.base)
        self._texts: dict[int, str] = {}

    @torch.no_grad()
    def nearest(self, order: int, slots: Tensor) -> tuple[tuple[tuple[str, ...], ...], Floats]:
        """Return the nearest words of slots [J, W], and their logits [J, few].

        Args:
            order: which bank, counted among the blocks with memory.
            slots: the slots.
        """
        bank = self.model.banks[order]
        weight = bank.read_value.weight
        added = bank.output(bank.read_value(rms_normalise(slots).to(weight.dtype)))
        head: nn.Module = self.model.get_output_embeddings()
        found = head(self.norm(added)).topk(self.few, dim=-1)
        words = tuple(tuple(self._text(index) for index in row) for row in found.indices.tolist())
        return words, found.values.float().cpu().numpy()

    def _text(self, index: int) -> str:
        if index not in self._texts:
            self._texts[index] = str(self.tokenizer.decode([index]))
        return self._texts[index]


def final_norm(base: PreTrainedModel) -> nn.Module:
    """Return the norm that stands before the head: the last norm beside the blocks, or nothing at all."""
    norms = [child for child in decoder_of(base).children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else nn.Identity()


def mean_read_weights(bank: MemoryBank, queries: Tensor, segment: SegmentRead) -> Tensor:
    """Return which share of each token's reads falls on every slot, mean over heads, [T, J], of one row's queries."""
    dtype = state_dtype(queries.dtype)
    wide = SegmentRead(*(part[:1].to(dtype) for part in segment))
    return bank.read_weights(queries.to(dtype), wide)[0].mean(dim=0)


def half_life(kept: Floats) -> Floats:
    """Return after how many updates half is left of what an update keeps the given shares of, log(1/2) / log(share)."""
    # A gate is a rounded number: what differs from 1 by rounding alone forgets nothing.
    forgets = ~(kept >= 1 - 1e-6)
    with np.errstate(divide="ignore"):
        found = np.log(0.5) / np.log(np.where(forgets, kept, 0.5))
    return np.asarray(np.where(forgets, found, np.inf), dtype=np.float32)


def look_up_segments(reading: Reading, most: int, holds_something: bool) -> list[int]:
    """Choose the segments after which words are looked up: first, last and some between; -1 = before the text.

    Args:
        reading: what is read.
        most: segments wanted at most, at least 1.
        holds_something: whether the memory holds something before the text.
    """
    complete = reading.num_segments if reading.complete else reading.num_segments - 1
    first = -1 if holds_something else 0
    if complete <= first:
        return []
    count = min(most, complete - first)
    return [int(number) for number in np.linspace(first, complete - 1, count).round()]


@contextmanager
def counting_reads(model: LM2ForCausalLM) -> Iterator[Floats]:
    """Within the context, count what every slot of every bank is read: token-reads [blocks with memory, J]."""
    counts = np.zeros((len(model.banks), model.config.num_slots))

    def count(order: int, read: Any, x: Tensor, segment: SegmentRead, **options: Any) -> ReadResult:
        result: ReadResult = read(x, segment, **options)
        with torch.no_grad():
            bank = model.banks[order]
            counts[order] += mean_read_weights(bank, bank.read_queries(x), segment).sum(dim=0).double().cpu().numpy()
        return result

    with ExitStack() as stack:
        for order, bank in enumerate(model.banks):
            stack.enter_context(calls_through(bank, "read", partial(count, order)))
        yield counts


class _Counting:
    """A recorder that only counts reads."""

    def __init__(self, model: LM2ForCausalLM) -> None:
        self.model = model
        self.counts: Floats = np.zeros((len(model.banks), model.config.num_slots))
        self.notes: list[str] = []
        self._running: Floats = self.counts

    @contextmanager
    def watch(self, _: Segment) -> Iterator[None]:
        """Count while a segment is read."""
        with counting_reads(self.model) as self._running:
            yield

    def read(self, _: Segment, __: MemoryState) -> None:
        """Add the segment's reads to those before."""
        self.counts = self.counts + self._running


def most_read_slots(model: LM2ForCausalLM, reading: Reading, state: LM2State | None, most: int) -> list[Integers]:
    """Read a text once to find the slots of every bank that are read most, in the order of their numbers.

    In flow `depth` the blocks share their slots, so the same ones are chosen for all.

    Args:
        model: who reads.
        reading: what is read.
        state: what was read before; None = nothing.
        most: slots to choose per bank.
    """
    counting = _Counting(model)
    for _ in read_segments(model, reading, [counting], state, logits_to_keep=1):
        pass
    counts = counting.counts
    if model.config.flow == "depth":
        counts = np.broadcast_to(counts.sum(axis=0), counts.shape)
    return [np.sort(np.argsort(-row, kind="stable")[:most]) for row in counts]
