"""Algebra inside chunks, shared by chunkwise forms.

Layout: `[B, H, N, C, ...]`, N chunks of C tokens; a chunk is a matrix, and the batch of matrices is in front of it.
"""

import torch
from torch import Tensor


def to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """Cut [B, T, H, ...] into chunks [B, H, N, C, ...]; T is a multiple of `chunk_size`."""
    batch, tokens, heads = x.shape[:3]
    parts = x.reshape(batch, tokens // chunk_size, chunk_size, heads, *x.shape[3:])
    return parts.movedim(3, 1).contiguous()


def from_chunks(x: Tensor) -> Tensor:
    """Join chunks [B, H, N, C, ...] to [B, T, H, ...]."""
    return x.movedim(1, 3).flatten(1, 2)


def causal_mask(size: int, device: torch.device, *, diagonal: int = 0) -> Tensor:
    """Return a mask [C, C] that is True where a token (row) sees a token (column) not after it.

    Args:
        size: tokens C.
        device: where.
        diagonal: 0 lets a token see itself, -1 only earlier ones.
    """
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(diagonal)


def pairwise_decay(b: Tensor) -> Tensor:
    """Return what a write at token j has decayed to at token i: exp(b_i - b_j) for j <= i, else 0.

    The mask comes before the exponential: b_i - b_j is positive above the diagonal and may overflow.

    Args:
        b: cumulative log decay within the chunk, both ends included, [..., C].

    Returns:
        Decay [..., C, C] between 0 and 1.
    """
    difference = b[..., :, None] - b[..., None, :]
    return difference.masked_fill(~causal_mask(b.shape[-1], b.device), float("-inf")).exp()


def solve_unit_lower(strictly_lower: Tensor, right: Tensor) -> Tensor:
    """Solve (I + A) X = R for strictly lower triangular A [..., C, C] and R [..., C, D]; entries above are ignored."""
    return torch.linalg.solve_triangular(strictly_lower, right, upper=False, unitriangular=True)
