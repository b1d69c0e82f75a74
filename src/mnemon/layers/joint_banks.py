"""Compact banks in training: what the blocks do alike is done for all of them at once.

A bank much narrower than the decoder has little to compute: what takes time is the number of operations, forward and
backward, for every block and segment. The bank of a segment is projected for all blocks in one product, and all blocks
turn what they gathered into gates in one; only what needs the bank that the block before left is done in turn.

Equal to `MemoryBank.open_segment` and `MemoryBank.update`, which say what is computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnemon.layers.lean_gradients import content_of, kept_bank, stretched_sigmoid
from mnemon.layers.memory_bank import RMS_EPS, GateValues, MemoryBank, SegmentRead, WriteStatistics


class Written(NamedTuple):
    """What the blocks write at the end of a segment, L of [B, J, W] each.

    Attributes:
        added: g_in * tanh(U).
        forget_logits: U W_f + b_f.
        input_gates: g_in.
    """

    added: tuple[Tensor, ...]
    forget_logits: tuple[Tensor, ...]
    input_gates: tuple[Tensor, ...]


def can_be_joined(banks: Sequence[MemoryBank]) -> bool:
    """Say whether banks are compact, so that joining them pays, and have the paper's projections alone."""
    plain = (not bank.recomputes and bank.is_plain for bank in banks)
    return bool(banks) and all(plain)


class JointBanks:
    """The banks of all blocks for the length of one forward pass.

    Their weights are copied side by side once, and their gradients are added up side by side over the segments.

    Args:
        banks: the bank of each block with memory, in the order of the blocks; L of them, of one size.
        dtype: dtype of the bank and its gates.
    """

    def __init__(self, banks: Sequence[MemoryBank], dtype: torch.dtype) -> None:
        first = banks[0]
        self._num_heads, self._scale, self._stretch = first.num_heads, first.scale, first.gate_stretch
        read = [linear for bank in banks for linear in (bank.read_key, bank.read_value, bank.write_query)]
        self._read = torch.stack([linear.weight for linear in read if linear is not None]).unflatten(
            0, (len(banks), 3)
        )  # [L, 3, W, W]
        slot_keys = torch.stack([bank.slot_key for bank in banks])
        self._slot_keys = self._split(slot_keys[:, None])  # [L, 1, H, J, d]
        gates = [gate for bank in banks for gate in (bank.input_gate, bank.forget_gate) if gate]
        weights = torch.stack([gate.weight for gate in gates]).to(dtype)
        self._gates = weights.unflatten(0, (len(banks), 2)).flatten(1, 2).mT  # [L, W, 2W]
        self._gate_bias = torch.stack([gate.bias for gate in gates]).to(dtype).view(len(banks), 1, -1)  # [L, 1, 2W]
        self._forget_bank = [bank.forget_gate_bank.weight.to(dtype) for bank in banks]

    def open_segment(self, normalised: Tensor) -> tuple[SegmentRead, ...]:
        """Project the segment-start bank, RMS-normalised, for every block.

        Args:
            normalised: [B, 1, J, W] where all blocks read the same bank, else [B, L, J, W].
        """
        layers = normalised.to(self._read.dtype).expand(-1, len(self._read), -1, -1)
        keys, values, queries = self._split(torch.einsum("bljw,lpvw->plbjv", layers, self._read)).unbind(0)
        queries = (queries + self._slot_keys) * self._scale
        return tuple(SegmentRead(*parts) for parts in zip(*(x.unbind(0) for x in (keys, values, queries)), strict=True))

    def prepare_update(self, statistics: Sequence[WriteStatistics]) -> Written:
        """Compute what of the update does not depend on the running bank, for every block.

        Args:
            statistics: every block's, over all tokens of the segment.
        """
        totals = torch.stack([block.total for block in statistics])
        values = torch.stack([block.value for block in statistics])
        num_blocks, rows = values.shape[:2]
        totals = totals.clamp_min(torch.finfo(totals.dtype).tiny)
        content = content_of(values.flatten(0, 1), totals.flatten(0, 1))
        content = content.transpose(1, 2).flatten(-2)  # [L B, J, W]
        with torch.autocast(content.device.type, enabled=False):
            logits = torch.baddbmm(self._gate_bias, content.view(num_blocks, -1, content.shape[-1]), self._gates)
        inputs, forgets = (part.view(num_blocks, rows, *content.shape[1:]) for part in logits.chunk(2, dim=-1))
        input_gate = stretched_sigmoid(inputs, self._stretch)
        added = input_gate * torch.tanh(content.view_as(input_gate))
        return Written(added.unbind(0), forgets.unbind(0), input_gate.unbind(0))

    def update(self, block: int, bank: Tensor, written: Written) -> tuple[Tensor, GateValues]:
        """Apply one block's gated update.

        Args:
            block: its number among the blocks with memory.
            bank: the running bank, [B, J, W] (in flow `depth` what the block before left).
            written: what `prepare_update` returned.
        """
        logits, added, weight = written.forget_logits[block], written.added[block], self._forget_bank[block]
        with torch.autocast(bank.device.type, enabled=False):
            updated, forget_gate = kept_bank(bank, logits, weight, added, self._stretch, RMS_EPS)
        return updated, GateValues(written.input_gates[block], forget_gate)

    def _split(self, x: Tensor) -> Tensor:
        """[..., N, W] -> [..., H, N, d]."""
        return x.unflatten(-1, (self._num_heads, -1)).transpose(-2, -3)
