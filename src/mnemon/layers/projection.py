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


class Groups(NamedTuple):
    """Which memory the rows of a stream of tokens belong to; rows of one memory stand together, in order of memories.

    Attributes:
        memory: number of each row's memory, [N] int64, never falling.
        counts: rows of each memory, on the host; None where finding out would make the host wait for a device.
    """

    memory: Tensor
    counts: Sequence[int] | None


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

    def forward(self, x: Tensor, groups: Groups | None) -> Tensor:
        """Return the rows [..., D] mapped by their memories, [..., out_features]."""
        return _grouped(x, self.weight, self.bias, groups)

    def wide(self, x: Tensor, groups: Groups | None) -> Tensor:
        """Return the same computed in the dtype of gates, whatever the model runs in."""
        dtype = state_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return _grouped(x.to(dtype), self.weight.to(dtype), bias, groups)

    def initial_values(self, bias: float = 0.0) -> InitialValues:
        """Return weights with a standard deviation of 1/sqrt(fan in), and a constant bias."""
        values: InitialValues = [(self.weight, torch.randn_like(self.weight) / math.sqrt(self.in_features))]
        return values if self.bias is None else [*values, (self.bias, torch.full_like(self.bias, bias))]


AnyProjection = Projection | GroupedProjection


def _grouped(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups | None) -> Tensor:
    """Multiply every row of [..., D] with the matrix [out, D] of its memory, and add the bias [M, out] or [out]."""
    assert groups is not None, "rows must be told which memory they belong to"
    rows = x.flatten(0, -2)
    if groups.counts is not None:
        pieces = zip(rows.split(list(groups.counts)), weight.unbind(), strict=True)
        y = torch.cat([F.linear(piece, matrix) for piece, matrix in pieces])
    else:
        # One product with all matrices; the host need not know how many rows each memory has.
        every = F.linear(rows, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        y = every.gather(1, groups.memory[:, None, None].expand(-1, 1, weight.shape[1]))[:, 0]
    if bias is not None:
        y = y + (bias if bias.ndim == 1 else bias.index_select(0, groups.memory))
    return y.unflatten(0, x.shape[:-1])
