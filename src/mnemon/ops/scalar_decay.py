"""Chunkwise form of memories that decay by a number per head and token, and add: S_t = exp(g_t) S_{t-1} + k_t^T v_t."""

import torch
from torch import Tensor

from mnemon.ops.chunking import decay_between, from_chunks, pairwise_decay, to_chunks


def chunkwise(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, chunk_size: int, g: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the rule for whole chunks.

    With b the cumulative sum of g within a chunk and D_ij = exp(b_i - b_j) for j <= i:

        O = (Q * exp(b)) S + (Q K^T * D) V;   S <- exp(b_C) S + (K * exp(b_C - b))^T V

    All chunk states come from one product with the decays between chunks.

    Args:
        q: queries, [B, T, H, K], T a multiple of `chunk_size`.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: memory S before the first token, [B, H, K, V].
        chunk_size: tokens per chunk.
        g: log decay, [B, T, H].

    Returns:
        Output [B, T, H, V] and the memory after the last token.

    Source:
        Transformers are SSMs, arXiv:2405.21060, section 6.
    """
    q, k, v, g = (to_chunks(x, chunk_size) for x in (q, k, v, g))
    b = g.cumsum(dim=-1)  # [B, H, N, C]
    written = (k * (b[..., -1:] - b).exp()[..., None]).mT @ v  # [B, H, N, K, V]
    additions = torch.cat([state[:, :, None], written], dim=2)
    states = (decay_between(b[..., -1]) @ additions.flatten(3)).unflatten(3, written.shape[3:])
    output = ((q @ k.mT) * pairwise_decay(b)) @ v + (q * b.exp()[..., None]) @ states[:, :, :-1]
    return from_chunks(output), states[:, :, -1]
