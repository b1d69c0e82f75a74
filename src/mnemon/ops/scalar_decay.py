"""Chunkwise form of memories that decay by a number per head and token, and add: S_t = exp(g_t) S_{t-1} + k_t^T v_t.

Its gradient is written by hand: it keeps the chunk states and computes the products again, because on a CPU touching
fresh memory costs more than they do. The log decay needs no products of its own. Every place where it acts, it scales a
query by exp(b_i) or a key by exp(-b_j), so its gradient is what queries and keys already have:

    db_i = q_i . dq_i - k_i . dk_i,   and for the chunk's last b also the gradient of everything scaled by exp(b_C).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemon.ops.chunking import add_product, chunk_states, from_chunks, pairwise_decay, to_chunks


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, chunk_size: int, g: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the rule for whole chunks.

    With b the cumulative sum of g within a chunk and D_ij = exp(b_i - b_j) for j <= i:

        O = (Q * exp(b)) S + (Q K^T * D) V;   S <- exp(b_C) S + (K * exp(b_C - b))^T V

    Args:
        q: queries, [B, T, H, K], T a multiple of `chunk_size`.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: memory S before the first token, [B, H, K, V].
        chunk_size: tokens per chunk.
        g: log decay, [B, T, H]; None is no decay.

    Returns:
        Output [B, T, H, V] and the memory after the last token.

    Source:
        Transformers are SSMs, arXiv:2405.21060, section 6.
    """
    output, after = _DecayChunks.apply(q, k, v, g, state, chunk_size)
    return output, after


class _DecayChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, g, state)
        ctx.chunk_size = chunk_size
        q, k, v = (to_chunks(x, chunk_size) for x in (q, k, v))
        b = None if g is None else to_chunks(g, chunk_size).cumsum(dim=-1)
        k_end = _scale(k, None if b is None else b[..., -1:] - b)
        start, after = chunk_states(k_end.mT @ v, _total(b), state)
        output = _scale(q, b) @ start
        add_product(output, _scores(q, k, b), v)
        return from_chunks(output), after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, state = ctx.saved_tensors
        q, k, v, grad = (to_chunks(x, ctx.chunk_size) for x in (q, k, v, grad_output))
        b = None if g is None else to_chunks(g, ctx.chunk_size).cumsum(dim=-1)
        to_end = None if b is None else b[..., -1:] - b
        total = _total(b)
        k_end = _scale(k, to_end)
        start, _ = chunk_states(k_end.mT @ v, total, state)
        after, grad_before = chunk_states(_scale(q, b).mT @ grad, total, grad_state, backwards=True)

        grad_v = k_end @ after
        add_product(grad_v, _scores(q, k, b).mT, grad)
        grad_scores = grad @ v.mT
        if b is None:
            grad_scores.tril_()
        else:
            grad_scores *= pairwise_decay(b)
        grad_q = _scale(grad @ start.mT, b)
        add_product(grad_q, grad_scores, k)
        grad_k = _scale(v @ after.mT, to_end)
        through_end = None if g is None else (grad_k * k).sum(dim=(-2, -1))  # exp(b_C) scales these keys ...
        add_product(grad_k, grad_scores.mT, q)
        grad_g = None
        if b is not None and through_end is not None:
            grad_b = (q * grad_q).sum(dim=-1) - (k * grad_k).sum(dim=-1)
            # ... and the chunk's first state.
            grad_b[..., -1] += through_end + b[..., -1].exp() * (after * start).sum(dim=(-2, -1))
            grad_g = from_chunks(grad_b.flip(-1).cumsum(dim=-1).flip(-1))
        return from_chunks(grad_q), from_chunks(grad_k), from_chunks(grad_v), grad_g, grad_before, None


def _scale(x: Tensor, exponent: Tensor | None) -> Tensor:
    """Scale rows of x [..., C, D] by exp(exponent) [..., C]."""
    return x if exponent is None else x * exponent.exp()[..., None]


def _scores(q: Tensor, k: Tensor, b: Tensor | None) -> Tensor:
    """Return Q K^T within chunks, decayed from the column's token to the row's, and 0 where that is later."""
    scores = q @ k.mT
    return scores.tril_() if b is None else scores.mul_(pairwise_decay(b))


def _total(b: Tensor | None) -> Tensor | None:
    """Return the decay of whole chunks, [B, H, N, 1, 1]."""
    return None if b is None else b[..., -1, None, None].exp()
