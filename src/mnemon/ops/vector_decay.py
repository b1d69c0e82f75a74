"""Chunkwise form of memories that decay per key channel and add: S_t = Diag(exp(g_t)) S_{t-1} + k_t^T v_t."""

import torch
from torch import Tensor

from mnemon.ops.chunking import decay_between, earlier_or_same, from_chunks, to_chunks

_SMALLEST_BLOCK = 1


def decayed_products(queries: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """Compute A_ij = sum over channels c of q_ic k_jc exp(b_ic - b_jc) for j <= i, else 0.

    The exponential does not factor into a part of i and a part of j without exponents above 0. It does for i in the
    second half of a block and j in the first, with the end of the first half as reference: both parts then have
    exponents of at most 0. Halves are split again until blocks are small, where every pair is evaluated on its own.

    Args:
        queries: q, [..., C, K].
        k: keys, [..., C, K]; its leading dimensions may broadcast against those of the queries.
        b: cumulative log decay within the chunk, the token itself included, [..., C, K], like k.

    Returns:
        A, [..., C, C].
    """
    size = b.shape[-2]
    block = size
    while block > _SMALLEST_BLOCK and block % 2 == 0:
        block //= 2
    products = _every_pair(*(x.unflatten(-2, (-1, block)) for x in (queries, k, b)))  # [..., C / block, block, block]
    while block < size:
        (_, q_second), (k_first, _), (b_first, b_second) = (
            x.unflatten(-2, (-1, 2, block)).unbind(-3) for x in (queries, k, b)
        )
        reference = b_first[..., -1:, :]
        cross = (q_second * (b_second - reference).exp()) @ (k_first * (reference - b_first).exp()).mT
        first, second = products.unflatten(-3, (-1, 2)).unbind(-3)
        products = torch.cat(
            [torch.cat([first, torch.zeros_like(first)], dim=-1), torch.cat([cross, second], dim=-1)], dim=-2
        )
        block *= 2
    return products.squeeze(-3)


def _every_pair(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """Evaluate the decay of every pair of tokens of small blocks: [..., C, K] to [..., C, C]."""
    later = ~earlier_or_same(b.shape[-2], b.device)[..., None]
    decay = (b[..., :, None, :] - b[..., None, :, :]).masked_fill(later, float("-inf")).exp()
    return (q[..., :, None, :] * (k[..., None, :, :] * decay)).sum(dim=-1)


def chunkwise(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, chunk_size: int, g: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the rule for whole chunks.

    With b the cumulative sum of g within a chunk (a row per token) and A from `decayed_products`:

        O = (Q * exp(b)) S + A V;   S <- Diag(exp(b_C)) S + (K * exp(b_C - b))^T V

    Args:
        q: queries, [B, T, H, K], T a multiple of `chunk_size`.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: memory S before the first token, [B, H, K, V].
        chunk_size: tokens per chunk.
        g: log decay, [B, T, H, K].

    Returns:
        Output [B, T, H, V] and the memory after the last token.

    Source:
        Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635, section 4.
    """
    q, k, v, g = (to_chunks(x, chunk_size) for x in (q, k, v, g))
    b = g.cumsum(dim=-2)  # [B, H, N, C, K]
    end = b[..., -1, :]
    written = (k * (end[..., None, :] - b).exp()).mT @ v  # [B, H, N, K, V]
    additions = torch.cat([state[:, :, None], written], dim=2).transpose(2, 3)  # [B, H, K, N + 1, V]
    states = (decay_between(end.mT) @ additions).transpose(2, 3)  # a channel has decays of its own: K batched products
    output = decayed_products(q, k, b) @ v + (q * b.exp()) @ states[:, :, :-1]
    return from_chunks(output), states[:, :, -1]
