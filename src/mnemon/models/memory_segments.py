"""Segments of a decoder with memory banks: read the bank, gather what will be written, update at the end.

Where a bank runs through several blocks, the first block reads what the last one wrote, so the decoder is called once
per segment. Where every bank belongs to one block, nothing a block reads comes from a later block: one call then takes
several segments through a block at once, and only the reads and writes of the bank go from segment to segment.

`MemorySegments.run` is a pure function of tokens and state, so that training may recompute it instead of keeping it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemon.layers.joint_banks import JointBanks, can_be_joined
from mnemon.layers.memory_bank import GateValues, MemoryBank, SegmentRead, WriteStatistics, rms_normalise, state_dtype
from mnemon.layers.memory_diagnostics import MemoryDiagnostics, written_share
from mnemon.models.decoder_state import DecoderState
from mnemon.models.graft import MemoryTerm, attached
from mnemon.models.segmented_decoder import SegmentedDecoder, call_tensor
from mnemon.models.segments import SegmentCall, complete_rows, where_rows
from mnemon.models.state import LM2State


class MemorySegments:
    """Runs segments of one forward pass.

    Args:
        decoder: the decoder under the memory.
        banks: the memory of each chosen block, by the block's index; empty = the memory is knocked out.
        flow: "depth" (one bank runs through the blocks) or "layer" (every block keeps its own).
        keep_pieces: carry keys and values in pieces (for training).
        recomputes: whether the caller recomputes segments in the backward pass.
        joins: whether what the blocks do alike may be done for all of them at once (`JointBanks`), which pays in
            training where every segment is a call of its own.
        diagnostics: takes what the memory does, if anybody asks.
        initial: initial bank [J, W].
    """

    def __init__(
        self,
        decoder: SegmentedDecoder,
        banks: dict[int, MemoryBank],
        flow: str,
        keep_pieces: bool,
        recomputes: bool,
        joins: bool,
        diagnostics: MemoryDiagnostics | None,
        initial: Tensor,
    ) -> None:
        self.decoder = decoder
        self.indices = list(banks)
        self.banks = list(banks.values())
        self.is_depth = flow == "depth"
        self.keep_pieces = keep_pieces
        self.recomputes = recomputes
        self.diagnostics = diagnostics
        self.initial = initial
        # Made before any segment, so that one recomputed in the backward pass does not make them again.
        joined = joins and torch.is_grad_enabled() and can_be_joined(self.banks)
        self.joint = JointBanks(self.banks, state_dtype(self.banks[0].output.weight.dtype)) if joined else None

    def frame(self, call: SegmentCall, writes: bool) -> SegmentCall:
        """Return the call as the decoder makes it: it holds nothing but its tokens."""
        return call

    def run(
        self, inputs: Tensor, call: SegmentCall, state: LM2State, slots: np.ndarray, writes: bool
    ) -> tuple[Tensor, LM2State]:
        """Run one call of the decoder, within one segment of every row or over several.

        Args:
            inputs: the call's tokens [B, width] or embeddings [B, width, D].
            call: which tokens these are.
            state: what earlier calls left; not changed.
            slots: columns of the call to compute logits for.
            writes: whether anybody carries on from the new state.
        Returns:
            Logits [B, len(slots), V] and the new state.
        """
        if not self.banks:
            logits, decoder = self._decode(inputs, call, state, slots)
            return logits, replace(state, decoder=decoder)
        if call.width > self.decoder.segment_length:
            return self._run_several(inputs, call, state, slots, writes)
        part = _Part.of(call, self.decoder.segment_length, state.bank.device)
        segments = self._open(state)
        statistics = list(state.statistics)
        banks, kept = self._by_block(state.bank), self._by_block(state.kept)

        def term(order: int, h: Tensor, x: Tensor, branch: Tensor) -> Tensor:
            joined = self._read(order, x, branch, segments[order], banks[order], kept[order], part)
            if writes:
                statistics[order] = self._gather(order, h + joined, segments[order], statistics[order], part)
            return joined

        with self._attached(term):
            logits, decoder = self._decode(inputs, call, state, slots)
        # With gradients nobody stops inside a segment, and the projections would only hold on to their graph.
        projections = () if torch.is_grad_enabled() else segments
        state = replace(state, decoder=decoder, statistics=tuple(statistics), projections=projections)
        return logits, self._close(state, part) if writes and part.completes else state

    def _run_several(
        self, inputs: Tensor, call: SegmentCall, state: LM2State, slots: np.ndarray, writes: bool
    ) -> tuple[Tensor, LM2State]:
        """Run one call of the decoder over several segments of every row: `run` for banks of one block each."""
        length, device = self.decoder.segment_length, state.bank.device
        parts = [_Part.of(part, length, device) for part in call.segments(length)]
        banks, kept, statistics = list(state.bank.unbind(1)), list(state.kept.unbind(1)), list(state.statistics)
        rates = state.write_rates

        def term(order: int, h: Tensor, x: Tensor, branch: Tensor) -> Tensor:
            nonlocal rates
            joined: list[Tensor] = []
            widths = [part.width for part in parts]
            queries = self.banks[order].read_queries(x).split(widths, 2)
            pieces = zip(parts, h.split(widths, 1), x.split(widths, 1), branch.split(widths, 1), queries, strict=True)
            for number, (part, residual, normalised, attended, asked) in enumerate(pieces):
                segment = self.banks[order].open_segment(_normalised(banks[order]))
                joined.append(self._read(order, normalised, attended, segment, banks[order], kept[order], part, asked))
                if not writes and number + 1 == len(parts):
                    continue
                past = self._gather(order, residual + joined[-1], segment, statistics[order], part)
                statistics[order] = past
                if part.completes:
                    updated, gates = self.banks[order].update(banks[order], past)
                    rates = None if rates is None else _counted(rates, gates, part.complete)
                    banks[order], kept[order] = self._renewed(order, banks[order], kept[order], updated, gates, part)
                    statistics[order] = _where_rows(part.complete, self._empty(state.batch_size), past)
            return torch.cat(joined, dim=1)

        with self._attached(term):
            logits, decoder = self._decode(inputs, call, state, slots)
        return logits, replace(
            state,
            decoder=decoder,
            bank=_stacked(banks),
            kept=_stacked(kept),
            statistics=tuple(statistics),
            projections=(),
            write_rates=rates,
        )

    def _decode(
        self, inputs: Tensor, call: SegmentCall, state: LM2State, slots: np.ndarray
    ) -> tuple[Tensor, DecoderState]:
        return self.decoder.run(inputs, call, state.decoder, slots, self.keep_pieces, self.recomputes)

    def _attached(self, term: MemoryTerm) -> Any:
        return attached(self.decoder.blocks, self.decoder.joins, self.indices, term)

    def _by_block(self, layers: Tensor) -> list[Tensor]:
        """Return the bank of every block, from [B, layers, J, W]."""
        found = list(layers.unbind(1))
        return found * len(self.banks) if self.is_depth else found

    def _open(self, state: LM2State) -> tuple[SegmentRead, ...]:
        """Return every block's projections of the bank its tokens read."""
        if state.projections:
            return state.projections
        normalised = _normalised(state.bank)
        if self.joint is not None:
            return self.joint.open_segment(normalised)
        layers = self._by_block(normalised)
        return tuple(bank.open_segment(layer) for bank, layer in zip(self.banks, layers, strict=True))

    def _read(
        self,
        order: int,
        x: Tensor,
        branch: Tensor,
        segment: SegmentRead,
        bank: Tensor,
        kept: Tensor,
        part: "_Part",
        queries: Tensor | None = None,
    ) -> Tensor:
        """Return the attention branch [B, T, D] of one block with the memory term."""
        read = self.banks[order].read(x, segment, wants_weights=self.diagnostics is not None, queries=queries)
        if self.diagnostics is not None and read.weights is not None:
            with torch.no_grad():
                share = written_share(bank, kept, self.initial)
            index = self.indices[order]
            self.diagnostics.add_read(index, read.weights, read.output_gate, share, read.term, branch, part.valid)
        return branch + read.term

    def _gather(
        self, order: int, residual: Tensor, segment: SegmentRead, past: WriteStatistics, part: "_Part"
    ) -> WriteStatistics:
        return self.banks[order].gather(residual, part.positions, part.valid, segment, past, part.is_fresh)

    def _close(self, state: LM2State, part: "_Part") -> LM2State:
        """Update the bank of every row whose segment is complete, block after block, and empty its statistics."""
        banks, kept = list(state.bank.unbind(1)), list(state.kept.unbind(1))
        empty = self._empty(state.batch_size)
        statistics = []
        update, rates = self._update_of(state.statistics), state.write_rates
        for order in range(len(self.banks)):
            layer, old = 0 if self.is_depth else order, state.statistics[order]
            updated, gates = update(order, banks[layer])
            rates = None if rates is None else _counted(rates, gates, part.complete)
            banks[layer], kept[layer] = self._renewed(order, banks[layer], kept[layer], updated, gates, part)
            statistics.append(_where_rows(part.complete, empty, old))
        return replace(
            state,
            bank=_stacked(banks),
            kept=_stacked(kept),
            statistics=tuple(statistics),
            projections=(),
            write_rates=rates,
        )

    def _empty(self, batch_size: int) -> WriteStatistics:
        return self.banks[0].empty_statistics(batch_size, self.banks[0].output.weight)

    def _renewed(
        self, order: int, bank: Tensor, kept: Tensor, updated: Tensor, gates: GateValues, part: "_Part"
    ) -> tuple[Tensor, Tensor]:
        """Return bank and kept share after an update of the rows whose segment is complete."""
        bank = where_rows(part.complete, updated, bank)
        with torch.no_grad():
            kept = where_rows(part.complete, kept * gates.forget_gate, kept)
            if self.diagnostics is not None:
                share, index = written_share(bank, kept, self.initial), self.indices[order]
                self.diagnostics.add_write(index, gates.input_gate, gates.forget_gate, bank, share, part.complete)
        return bank, kept

    def _update_of(self, statistics: Sequence[WriteStatistics]) -> Callable[[int, Tensor], tuple[Tensor, GateValues]]:
        """Return what updates a bank by the statistics of a block: (number of the block, bank) -> (bank, gates)."""
        joint = self.joint
        if joint is None:
            return lambda order, bank: self.banks[order].update(bank, statistics[order])
        written = joint.prepare_update(statistics)
        return lambda order, bank: joint.update(order, bank, written)


class _Part(NamedTuple):
    """Tokens that lie within one segment of every row, as the memory sees them.

    Attributes:
        width: columns.
        positions: index of each token inside its segment, [B, width] or [1, width].
        valid: which columns hold a token, [B, width]; None = all.
        is_fresh: whether every row begins a segment.
        completes: whether the segment of some row is complete.
        complete: of which rows it is, [B]; None = all.
    """

    width: int
    positions: Tensor
    valid: Tensor | None
    is_fresh: bool
    completes: bool
    complete: Tensor | None

    @classmethod
    def of(cls, call: SegmentCall, segment_length: int, device: torch.device) -> "_Part":
        """Put what the memory needs to know of a call on the device."""
        valid = None
        if not call.is_dense:
            valid = torch.from_numpy(np.arange(call.width)[None, :] < call.lengths[:, None]).to(device)
        return cls(
            call.width,
            call_tensor(call.positions % segment_length, call, device),
            valid,
            bool((call.starts % segment_length == 0).all()),
            bool(call.completes.any()),
            complete_rows(call, device),
        )


def _normalised(bank: Tensor) -> Tensor:
    """Return an RMS-normalised bank [B, ..., J, W], of one row where all rows are one and the same."""
    # Before the first update all rows are one and the same expanded bank: project it once.
    is_initial = torch.is_grad_enabled() and bank.stride(0) == 0
    return rms_normalise(bank[:1] if is_initial else bank)


def _counted(rates: tuple[Tensor, Tensor], gates: GateValues, complete: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add the slots' mean rate of one update to the sums of the rows whose segment is complete, and count it."""
    assert gates.rate is not None  # the configuration asks for a skip gate
    sums, updates = rates
    more = where_rows(complete, gates.rate.mean(dim=(1, 2)), torch.zeros_like(sums))
    return sums + more, updates + where_rows(complete, torch.ones_like(updates), torch.zeros_like(updates))


def _where_rows(complete: Tensor | None, empty: WriteStatistics, old: WriteStatistics) -> WriteStatistics:
    """Choose the rows of `empty` whose segment is complete."""
    peak, total, value = (where_rows(complete, *pair) for pair in zip(empty[:3], old[:3], strict=True))
    tail = None if empty.tail is None or old.tail is None else where_rows(complete, empty.tail, old.tail)
    return WriteStatistics(peak, total, value, tail)


def _stacked(layers: list[Tensor]) -> Tensor:
    return layers[0][:, None] if len(layers) == 1 else torch.stack(layers, dim=1)
