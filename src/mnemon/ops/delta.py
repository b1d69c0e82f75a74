"""Chunkwise form of the delta rules: memories that write the error of what they recall.

With a decay a_t (none, a number or a vector over key channels):

    S' = a_t S_{t-1};   S_t = S' + k_t^T u_t;   u_t = beta_t (v_t - k_t S')

Inside a chunk, u depends on earlier u through a unit lower triangular system (the WY representation). Its solution is
affine in the chunk's first state S, U - W S, so everything but a short recurrence over chunk states is computed for all
chunks at once.

Source: Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484, section 3; Gated
Delta Networks, arXiv:2412.06464, section 3.3; Kimi Linear, arXiv:2510.26692, section 3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mnemon.ops.chunking import affine_scan, from_chunks, pairwise_decay, solve_unit_lower, to_chunks
from mnemon.ops.vector_decay import decayed_products


class _Decayed(NamedTuple):
    """What the decay makes of queries and keys within a chunk; everything is [B, H, N, ...].

    Attributes:
        qk: q_i . k_j, decayed from j to i, for j <= i, [C, C].
        kk: k_i . k_j, the same, [C, C].
        q_start: queries times the decay since the chunk's first state, [C, K].
        k_start: keys, the same, [C, K].
        k_end: keys times the decay up to the chunk's end, [C, K].
        total: decay over the whole chunk, [K] or [1].
    """

    qk: Tensor
    kk: Tensor
    q_start: Tensor
    k_start: Tensor
    k_end: Tensor
    total: Tensor


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, chunk_size: int, beta: Tensor, g: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute a delta rule for whole chunks.

        (I + A) [U W] = beta * [V, K_start];   A = strictly lower part of beta * KK
        X = U - W S;   O = Q_start S + QK X;   S <- Diag(total) S + K_end^T X

    Args:
        q: queries, [B, T, H, K], T a multiple of `chunk_size`.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: memory S before the first token, [B, H, K, V].
        chunk_size: tokens per chunk.
        beta: write strength, [B, T, H].
        g: log decay, [B, T, H] or [B, T, H, K]; None is no decay.

    Returns:
        Output [B, T, H, V] and the memory after the last token.
    """
    batch, _, heads, value_dim = v.shape
    q, k, v, beta = (to_chunks(x, chunk_size) for x in (q, k, v, beta[..., None]))
    d = _decay(q, k, None if g is None else to_chunks(g, chunk_size))
    right = torch.cat([beta * v, beta * d.k_start], dim=-1)
    u, w = solve_unit_lower(beta * d.kk, right).split([value_dim, k.shape[-1]], dim=-1)
    # S <- (Diag(total) - K_end^T W) S + K_end^T U: one small product per chunk is all that has to wait.
    moved = d.k_end.mT @ torch.cat([u, w], dim=-1)
    added, erased = moved.split([value_dim, k.shape[-1]], dim=-1)
    transition = torch.diag_embed(d.total.expand(*d.total.shape[:-1], k.shape[-1])) - erased
    transition, added = (x.flatten(0, 1).transpose(0, 1).contiguous() for x in (transition, added))
    states = affine_scan(transition, added, state.flatten(0, 1))  # [N + 1, B H, K, V]
    states = states.transpose(0, 1).unflatten(0, (batch, heads))
    start = states[:, :, :-1]
    output = d.q_start @ start + d.qk @ (u - w @ start)
    return from_chunks(output), states[:, :, -1]


def _decay(q: Tensor, k: Tensor, g: Tensor | None) -> _Decayed:
    """Apply the decay of chunks g [B, H, N, C] or [B, H, N, C, K] to queries and keys [B, H, N, C, K]."""
    if g is None:
        both = torch.cat([q, k], dim=-2) @ k.mT
        qk, kk = both.chunk(2, dim=-2)
        return _Decayed(qk.tril(), kk, q, k, k, k.new_ones(*k.shape[:-2], 1))
    if g.ndim == k.ndim:
        b = g.cumsum(dim=-2)
        qk, kk = decayed_products(torch.stack([q, k]), k, b)
        end = b[..., -1:, :]
    else:
        b = g.cumsum(dim=-1)
        decay = pairwise_decay(b)
        qk, kk = (q @ k.mT) * decay, (k @ k.mT) * decay
        b, end = b[..., None], b[..., -1:, None]
    since_start = b.exp()
    return _Decayed(qk, kk, q * since_start, k * since_start, k * (end - b).exp(), end[..., 0, :].exp())
