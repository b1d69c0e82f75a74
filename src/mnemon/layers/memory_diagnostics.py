"""What a memory bank is doing: are its reads on content or on the blank bank, are its slots alike, are its gates open?

A bank that trains badly mostly fails in one of three ways: tokens read slots nothing was ever written to, slots are
all alike, or a gate is stuck. These numbers tell. They cost a few reductions per call and carry no gradient.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-12


def written_share(bank: Tensor, kept: Tensor, initial: Tensor) -> Tensor:
    """Tell how much of every slot was written, as opposed to left over from the initial bank.

        share = 1 - |P * M0|² / (|P * M0|² + |M - P * M0|²)

    Args:
        bank: slots M, [..., J, W].
        kept: running product P of their forget gates, [..., J, W].
        initial: initial bank M0, [J, W].
    Returns:
        Shares in [0, 1], [..., J]: 0 for a slot that was never written, 1 for one that kept nothing of the start.
    """
    left = kept * initial.to(kept.dtype)
    old = left.square().sum(dim=-1)
    new = (bank - left).square().sum(dim=-1)
    return new / (old + new).clamp_min(_TINY)


def slot_similarity(bank: Tensor) -> Tensor:
    """Return the mean absolute cosine between different slots of a bank [..., J, W], shape [...]; 1 = all alike."""
    slots = F.normalize(bank, dim=-1)
    cosines = (slots @ slots.transpose(-1, -2)).abs()
    count = bank.shape[-2]
    diagonal = cosines.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (cosines.sum(dim=(-1, -2)) - diagonal) / max(count * (count - 1), 1)


class MemoryDiagnostics:
    """Running sums over the calls of one or several forward passes.

    Names of the numbers, each a mean: over tokens and heads for the reads (`read_on_written`, `read_slots`,
    `output_gate`, `term_to_attention`), over segments and rows for the writes (`input_gate`, `forget_gate`,
    `written_share`, `slot_similarity`, `bank_rms`; `memory_change`, `memory_rms` of memories without gates).

    - `read_on_written`: share of the read mass that falls on written content.
    - `read_slots`: number of slots a token reads, as exp(entropy) of its read weights.
    - `term_to_attention`: norm of the memory term over the norm of the attention branch it joins.
    - `memory_change`: norm of what one segment changed over the norm of what the memory then holds.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | float] = defaultdict(float)
        self.read_mass: dict[int, Tensor] = {}

    @torch.no_grad()
    def add_read(
        self,
        block: int,
        weights: Tensor,
        output_gate: Tensor,
        share: Tensor,
        term: Tensor,
        branch: Tensor,
        valid: Tensor | None,
    ) -> None:
        """Take the reads of one call.

        Args:
            block: index of the decoder block.
            weights: read weights [B, H, T, J].
            output_gate: [B, T, W].
            share: written share of the slots read, [B or 1, J].
            term: memory term [B, T, D].
            branch: attention branch it joins, [B, T, D].
            valid: True where a token is real, [B, T]; None = all.
        """
        weights = weights.float()
        real = torch.ones_like(term[..., 0]) if valid is None else valid.to(term.dtype)
        mass = (weights.mean(dim=1) * real[..., None]).sum(dim=1)
        entropy = -(weights * weights.clamp_min(_TINY).log()).sum(dim=-1).mean(dim=1)
        ratio = term.float().norm(dim=-1) / branch.float().norm(dim=-1).clamp_min(_TINY)
        count = real.sum()
        self._add("read_on_written", block, (mass * share).sum(), count)
        self._add("read_slots", block, (entropy.exp() * real).sum(), count)
        self._add("output_gate", block, (output_gate.float().mean(dim=-1) * real).sum(), count)
        self._add("term_to_attention", block, (ratio * real).sum(), count)
        self.read_mass[block] = self.read_mass.get(block, 0) + mass.sum(dim=0)

    @torch.no_grad()
    def add_write(
        self, block: int, input_gate: Tensor, forget_gate: Tensor, bank: Tensor, share: Tensor, complete: Tensor | None
    ) -> None:
        """Take the update of one segment.

        Args:
            block: index of the decoder block.
            input_gate: [B, J, W].
            forget_gate: [B, J, W].
            bank: the updated bank [B, J, W].
            share: its written share [B, J].
            complete: rows whose segment is complete, [B]; None = all.
        """
        rows = torch.ones_like(share[:, 0]) if complete is None else complete.to(share.dtype)
        count = rows.sum()
        for name, per_row in (
            ("input_gate", input_gate.mean(dim=(1, 2))),
            ("forget_gate", forget_gate.mean(dim=(1, 2))),
            ("written_share", share.mean(dim=1)),
            ("slot_similarity", slot_similarity(bank)),
            ("bank_rms", bank.square().mean(dim=(1, 2)).sqrt()),
        ):
            self._add(name, block, (per_row * rows).sum(), count)

    @torch.no_grad()
    def add_change(self, block: int | None, old: Tensor, new: Tensor, complete: Tensor | None) -> None:
        """Take what one segment made of a memory.

        Args:
            block: index of the decoder block; None = the memory belongs to none.
            old: the memory before, [B, ...].
            new: the memory after.
            complete: rows whose segment is complete, [B]; None = all.
        """
        before, after = old.float().flatten(1), new.float().flatten(1)
        change = (after - before).norm(dim=1) / after.norm(dim=1).clamp_min(_TINY)
        rows = torch.ones_like(change) if complete is None else complete.to(change.dtype)
        self._add("memory_change", block, (change * rows).sum(), rows.sum())
        self._add("memory_rms", block, (after.square().mean(dim=1).sqrt() * rows).sum(), rows.sum())

    def _add(self, name: str, block: int | None, total: Tensor, count: Tensor) -> None:
        for key in (name,) if block is None else (name, f"{name}/block{block}"):
            self._sums[key] = self._sums.get(key, 0) + total.double()
            self._weights[key] = self._weights[key] + count.double()

    def means(self) -> dict[str, Tensor]:
        """Return the means by name, over all blocks and (as `name/blockN`) for each; scalars on their device."""
        return {name: total / torch.as_tensor(self._weights[name]).clamp_min(1) for name, total in self._sums.items()}

    def read_shares(self) -> dict[int, list[float]]:
        """Return for every block which share of all reads each slot got."""
        return {block: (mass / mass.sum().clamp_min(_TINY)).tolist() for block, mass in self.read_mass.items()}
