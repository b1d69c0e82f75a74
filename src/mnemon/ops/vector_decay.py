"""Chunkwise form of memories that decay per key channel and add: S_t = Diag(exp(g_t)) S_{t-1} + k_t^T v_t."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemon.ops.channel_decay import ChannelDecay
from mnemon.ops.chunking import add_product, chunk_states, from_chunks, to_chunks


def chunkwise(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, chunk_size: int, g: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the rule for whole chunks.

    With b the cumulative sum of g within a chunk (a row per token) and A the decayed products of queries and keys:

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
    size = chunk_size & -chunk_size  # spans of tokens are joined in pairs
    output, after = _DecayChunks.apply(q, k, v, g, state, size)
    return output, after


class _DecayChunks(torch.autograd.Function):
    """`chunkwise`, keeping its inputs only; the gradient is that of `mnemon.ops.scalar_decay`, channel by channel."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, g, state)
        ctx.chunk_size = chunk_size
        q, k, v, g = (to_chunks(x, chunk_size) for x in (q, k, v, g))
        decay = ChannelDecay([q], k, g, keep=False)
        start, after = chunk_states(decay.to_end.mT @ v, decay.total.mT, state)
        output = decay.since_start[0] @ start
        add_product(output, decay.products[0], v)
        return from_chunks(output), after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, state = ctx.saved_tensors
        q, k, v, g, grad = (to_chunks(x, ctx.chunk_size) for x in (q, k, v, g, grad_output))
        decay = ChannelDecay([q], k, g, keep=True)
        start, _ = chunk_states(decay.to_end.mT @ v, decay.total.mT, state)
        asked = decay.since_start[0].mT @ grad
        after, grad_before = chunk_states(asked, decay.total.mT, grad_state, backwards=True)
        grad_v = decay.to_end @ after
        add_product(grad_v, decay.products[0].mT, grad)
        grad_total = (after * start).sum(dim=-1)[..., None, :]
        (grad_q,), grad_k, grad_g = decay.backward([grad @ v.mT], [grad @ start.mT], v @ after.mT, grad_total)
        return *(from_chunks(x) for x in (grad_q, grad_k, grad_v, grad_g)), grad_before, None
