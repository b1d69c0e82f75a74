"""Linear maps of a memory layer: one for all tokens, or one per memory for tokens sorted by memory."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemon.ops.state import state_dtype

InitialValues = list[tuple[Tensor, Tensor]]
"""Parameters with their initial values."""


Matrices = dict[int, tuple[Tensor, ...]]
"""The matrices of weights [M, out, D], by the identity of the weight."""


class Groups(NamedTuple):
    """Which memory the rows of a stream of tokens belong to; rows of one memory stand together, in order of memories.

    Attributes:
        memory: number of each row's memory, [N] int64, never falling.
        counts: rows of each memory, on the host; None where finding out would make the host wait for a device.
        matrices: the matrices of each weight, taken apart once for all groups of a call: every view of a weight that
            is taken by itself costs a gradient of the size of the whole.
    """

    memory: Tensor
    counts: Sequence[int] | None
    matrices: Matrices | None = None


def one_group(
    memory: int, num_memories: int, rows: int, device: torch.device, matrices: Matrices | None = None
) -> Groups:
    """Return the groups of rows that all belong to one of several memories."""
    counts = [0] * num_memories
    counts[memory] = rows
    return Groups(torch.full((rows,), memory, device=device), counts, matrices)


class Projection(nn.Linear):
    """A linear layer whose initial values are the business of the layer around it (its `initial_values`).

    It is the same for all memories.
    """

    def forward(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Return x W + b for rows [..., D]."""
        return F.linear(x, self.weight, self.bias)

    def wide(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Return x W + b computed in the dtype of gates, whatever the model runs in."""
        dtype = state_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # which would take the products in bfloat16
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)

    def initial_values(self, bias: float = 0.0) -> InitialValues:
        """Return weights with a standard deviation of 1/sqrt(fan in), and a constant bias."""
        values: InitialValues = [(self.weight, torch.randn_like(self.weight) / math.sqrt(self.in_features))]
        return values if self.bias is None else [*values, (self.bias, torch.full_like(self.bias, bias))]


class GroupedProjection(nn.Module):
    """A linear map for each of several memories: row n becomes x_n W_m + b_m, m the memory the row belongs to.

    Args:
        num_memories: memories M.
        in_features: width D of the rows.
        out_features: width of the results.
        bias: "memory" for a bias per memory, "shared" for one for all, None for none.
    """

    def __init__(self, num_memories: int, in_features: int, out_features: int, bias: str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_memories, out_features, in_features))
        shape = {"memory": (num_memories, out_features), "shared": (out_features,)}
        self.bias = None if bias is None else nn.Parameter(torch.empty(shape[bias]))

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which every memory has its own, [M, ...]."""
        return [p for p in (self.weight, self.bias) if p is not None and p.ndim == (3 if p is self.weight else 2)]

    def forward(self, x: Tensor, groups: Groups | None) -> Tensor:
        """Return the rows [..., D] mapped by their memories, [..., out_features]."""
        return self._map(x, self.bias, groups)

    def wide(self, x: Tensor, groups: Groups | None) -> Tensor:
        """Return the same computed in the dtype of gates, whatever the model runs in."""
        dtype = state_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return self._map(x.to(dtype), bias, groups)

    def initial_values(self, bias: float = 0.0) -> InitialValues:
        """Return weights with a standard deviation of 1/sqrt(fan in), and a constant bias."""
        values: InitialValues = [(self.weight, torch.randn_like(self.weight) / math.sqrt(self.in_features))]
        return values if self.bias is None else [*values, (self.bias, torch.full_like(self.bias, bias))]

    def _map(self, x: Tensor, bias: Tensor | None, groups: Groups | None) -> Tensor:
        """Multiply every row of [..., D] with the matrix of its memory in the dtype of x, and add the bias."""
        assert groups is not None, "rows must be told which memory they belong to"
        if groups.counts is None:
            y = self._select_after(x, groups.memory)
        else:
            y = self._multiply_groups(x, groups.counts, groups.matrices)
        if bias is None:
            return y
        return y + (bias if bias.ndim == 1 else bias.index_select(0, groups.memory).view_as(y))

    def _multiply_groups(self, x: Tensor, counts: Sequence[int], known: Matrices | None) -> Tensor:
        """Multiply the rows of each memory by themselves."""
        key = id(self.weight)
        matrices = self.weight.unbind() if known is None or key not in known else known[key]
        if known is not None:
            known[key] = matrices
        rows = x.flatten(0, -2)
        pieces = [
            F.linear(piece, matrix.to(x.dtype))
            for piece, matrix in zip(rows.split(list(counts)), matrices, strict=True)
            if len(piece)
        ]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else rows.new_zeros(0, self.out_features)
        return y.unflatten(0, x.shape[:-1])

    def _select_after(self, x: Tensor, memory: Tensor) -> Tensor:
        """Multiply all rows with all matrices, which needs no knowledge of how many rows each memory has."""
        rows = x.flatten(0, -2)
        every = F.linear(rows, self.weight.flatten(0, 1).to(x.dtype)).unflatten(-1, self.weight.shape[:2])
        y = every.gather(1, memory[:, None, None].expand(-1, 1, self.out_features))[:, 0]
        return y.unflatten(0, x.shape[:-1])


AnyProjection = Projection | GroupedProjection
