"""One segment of a decoder with memory banks: read the bank, gather what will be written, update at the end.

`MemorySegments.run` is a pure function of tokens and state, so that training may recompute it instead of keeping it.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemon.layers.joint_banks import JointBanks, can_be_joined
from mnemon.layers.memory_bank import GateValues, MemoryBank, SegmentRead, WriteStatistics, rms_normalise, state_dtype
from mnemon.layers.memory_diagnostics import MemoryDiagnostics, written_share
from mnemon.models.graft import attached
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
        joins = torch.is_grad_enabled() and can_be_joined(self.banks)
        self.joint = JointBanks(self.banks, state_dtype(self.banks[0].output.weight.dtype)) if joins else None

    def frame(self, call: SegmentCall, writes: bool) -> SegmentCall:
        """Return the call as the decoder makes it: it holds nothing but its tokens."""
        return call

    def run(
        self, inputs: Tensor, call: SegmentCall, state: LM2State, slots: np.ndarray, writes: bool
    ) -> tuple[Tensor, LM2State]:
        """Run one call of the decoder, within one segment of every row.

        Args:
            inputs: the call's tokens [B, width] or embeddings [B, width, D].
            call: which tokens these are.
            state: what earlier calls left; not changed.
            slots: columns of the call to compute logits for.
            writes: whether anybody carries on from the new state.
        Returns:
            Logits [B, len(slots), V] and the new state.
        """
        segments = self._open(state)
        statistics = list(state.statistics)
        with self._attached(call, state, segments, statistics if writes else None):
            logits, decoder = self.decoder.run(inputs, call, state.decoder, slots, self.keep_pieces, self.recomputes)
        # With gradients nobody stops inside a segment, and the projections would only hold on to their graph.
        projections = () if torch.is_grad_enabled() else segments
        state = replace(state, decoder=decoder, statistics=tuple(statistics), projections=projections)
        return logits, self._close(state, call) if self.banks and writes and call.completes.any() else state

    def _open(self, state: LM2State) -> tuple[SegmentRead, ...]:
        """Return every block's projections of the bank its tokens read."""
        if not self.banks or state.projections:
            return state.projections if self.banks else ()
        # Before the first update all rows are one and the same expanded bank: project it once.
        is_initial = torch.is_grad_enabled() and state.bank.stride(0) == 0
        normalised = rms_normalise(state.bank[:1] if is_initial else state.bank)
        if self.joint is not None:
            return self.joint.open_segment(normalised)
        layers = normalised.unbind(1)
        return tuple(bank.open_segment(layers[0 if self.is_depth else order]) for order, bank in enumerate(self.banks))

    def _attached(
        self,
        call: SegmentCall,
        state: LM2State,
        segments: tuple[SegmentRead, ...],
        statistics: list[WriteStatistics] | None,
    ) -> Any:
        """Attach the memory term for one call; as a side effect it replaces the entries of `statistics`."""
        if not segments:
            return nullcontext()
        device = state.bank.device
        positions = call_tensor(call.positions % self.decoder.segment_length, call, device)
        valid = None
        is_fresh = bool((call.starts % self.decoder.segment_length == 0).all())
        if not call.is_dense:
            valid = torch.from_numpy(np.arange(call.width)[None, :] < call.lengths[:, None]).to(device)

        def term(order: int, h: Tensor, x: Tensor, branch: Tensor) -> Tensor:
            bank = self.banks[order]
            read = bank.read(x, segments[order], wants_weights=self.diagnostics is not None)
            if self.diagnostics is not None and read.weights is not None:
                share = self._written_share(state, order)
                self.diagnostics.add_read(
                    self.indices[order], read.weights, read.output_gate, share, read.term, branch, valid
                )
            joined = branch + read.term
            if statistics is not None:
                past = statistics[order]
                statistics[order] = bank.gather(h + joined, positions, valid, segments[order], past, is_fresh)
            return joined

        return attached(self.decoder.blocks, self.decoder.joins, self.indices, term)

    def _written_share(self, state: LM2State, order: int) -> Tensor:
        layer = 0 if self.is_depth else order
        with torch.no_grad():
            return written_share(state.bank[:, layer], state.kept[:, layer], self.initial)

    def _close(self, state: LM2State, call: SegmentCall) -> LM2State:
        """Update the bank of every row whose segment is complete, block after block, and empty its statistics."""
        complete = complete_rows(call, state.bank.device)
        banks, kept = list(state.bank.unbind(1)), list(state.kept.unbind(1))
        empty = self.banks[0].empty_statistics(state.batch_size, self.banks[0].output.weight)
        statistics = []
        update, rates = self._update_of(state.statistics), state.write_rates
        for order in range(len(self.banks)):
            layer, old = 0 if self.is_depth else order, state.statistics[order]
            updated, gates = update(order, banks[layer])
            rates = None if rates is None else _counted(rates, gates, complete)
            banks[layer] = where_rows(complete, updated, banks[layer])
            with torch.no_grad():
                kept[layer] = where_rows(complete, kept[layer] * gates.forget_gate, kept[layer])
            self._note_write(order, gates, banks[layer], kept[layer], complete)
            statistics.append(_where_rows(complete, empty, old))
        return replace(
            state,
            bank=_stacked(banks),
            kept=_stacked(kept),
            statistics=tuple(statistics),
            projections=(),
            write_rates=rates,
        )

    def _update_of(self, statistics: Sequence[WriteStatistics]) -> Callable[[int, Tensor], tuple[Tensor, GateValues]]:
        """Return what updates a bank by the statistics of a block: (number of the block, bank) -> (bank, gates)."""
        joint = self.joint
        if joint is None:
            return lambda order, bank: self.banks[order].update(bank, statistics[order])
        written = joint.prepare_update(statistics)
        return lambda order, bank: joint.update(order, bank, written)

    def _note_write(self, order: int, gates: GateValues, bank: Tensor, kept: Tensor, complete: Tensor | None) -> None:
        if self.diagnostics is not None:
            with torch.no_grad():
                share = written_share(bank, kept, self.initial)
            self.diagnostics.add_write(self.indices[order], gates.input_gate, gates.forget_gate, bank, share, complete)


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
