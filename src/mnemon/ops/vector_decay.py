"""Chunkwise form of memories that decay per key channel and add: S_t = Diag(exp(g_t)) S_{t-1} + k_t^T v_t."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mnemon.ops.chunking import chunk_states, from_chunks, to_chunks


def decayed_products(queries: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """Compute A_ij = sum over channels c of q_ic k_jc exp(b_ic - b_jc) for j <= i, else 0.

    The exponential does not factor into a part of i and a part of j without exponents above 0. It does for i in the
    second half of a span and j in the first, with the end of the first half as reference: both parts then have
    exponents of at most 0. Halves are split again, down to single tokens.

    Args:
        queries: q, [..., C, K].
        k: keys, [..., C, K]; its leading dimensions may broadcast against those of the queries.
        b: cumulative log decay within the chunk, the token itself included, [..., C, K], like k.

    Returns:
        A, [..., C, C].
    """
    size = b.shape[-2]
    missing = (1 << (size - 1).bit_length()) - size  # to a power of two
    if missing:
        queries, k = (F.pad(x, (0, 0, 0, missing)) for x in (queries, k))
        b = torch.cat([b, b[..., -1:, :].expand(*b.shape[:-2], missing, -1)], dim=-2)
    products: Tensor = _DecayedProducts.apply(queries, k, b)
    return products[..., :size, :size]


class _DecayedProducts(torch.autograd.Function):
    """`decayed_products` of a power of two of tokens, without its intermediate results between the two directions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, b)
        size = b.shape[-2]
        products = q.new_zeros(*q.shape[:-2], size, size)
        products.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(dim=-1))
        for half in half_sizes(size):
            from_middle, to_middle = split_decay(b, half)
            q_second, k_first = halves(q, half)[1], halves(k, half)[0]
            cross_products(products, half).copy_((q_second * from_middle) @ (k_first * to_middle).mT)
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, b = ctx.saved_tensors
        own = grad.diagonal(dim1=-2, dim2=-1)[..., None]
        grad_q, grad_k = own * k, (own * q).sum_to_size(k.shape)
        for half in half_sizes(b.shape[-2]):
            from_middle, to_middle = split_decay(b, half)
            q_second, k_first, cross = halves(q, half)[1], halves(k, half)[0], cross_products(grad, half)
            halves(grad_q, half)[1].addcmul_(_product(cross, k_first * to_middle), from_middle)
            to_keys = _product(cross.mT, q_second * from_middle)
            halves(grad_k, half)[0].addcmul_(to_keys.sum_to_size(k_first.shape), to_middle)
        # b_i enters only as q_i exp(b_i) and k_i exp(-b_i).
        return grad_q, grad_k, (q * grad_q).sum_to_size(b.shape) - k * grad_k


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B; written out for one or two columns of A, on which batched matrix products are slow."""
    if a.shape[-1] > 2:
        return a @ b
    result = a[..., :1] * b[..., :1, :]
    return result if a.shape[-1] == 1 else result.addcmul_(a[..., 1:], b[..., 1:, :])


def half_sizes(size: int) -> list[int]:
    """Return 1, 2, 4, ..., size / 2."""
    return [1 << level for level in range(size.bit_length() - 1)]


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """View [..., C, K] as first and second halves of spans of 2 `half` tokens, each [..., C / 2 half, half, K]."""
    first, second = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return first, second


def split_decay(b: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return the decay from every span's middle to the tokens of its second half, and from those of its first to it."""
    first, second = halves(b, half)
    middle = first[..., -1:, :]
    return (second - middle).exp_(), (middle - first).exp_()


def cross_products(products: Tensor, half: int) -> Tensor:
    """View what second halves see of first halves in [..., C, C]: [..., C / 2 half, half, half]."""
    spans = products.shape[-1] // (2 * half)
    blocks = products.unflatten(-2, (spans, 2, half)).unflatten(-1, (spans, 2, half))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


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
    output, after = _DecayChunks.apply(q, k, v, g, state, chunk_size)
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
        b = g.cumsum(dim=-2)  # [B, H, N, C, K]
        end = b[..., -1:, :]
        states = chunk_states((k * (end - b).exp_()).mT @ v, end.exp().mT, state)
        output = (q * b.exp()) @ states[:, :, :-1]
        output += decayed_products(q, k, b) @ v
        return from_chunks(output), states[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, state = ctx.saved_tensors
        q, k, v, g, grad = (to_chunks(x, ctx.chunk_size) for x in (q, k, v, g, grad_output))
        b = g.cumsum(dim=-2)
        since_start, to_end = b.exp(), (b[..., -1:, :] - b).exp_()
        total = since_start[..., -1:, :].mT
        k_end = k * to_end
        start = chunk_states(k_end.mT @ v, total, state)[:, :, :-1]
        grad_states = chunk_states((q * since_start).mT @ grad, total, grad_state, backwards=True)
        after = grad_states[:, :, 1:]

        inputs = [x.detach().requires_grad_() for x in (q, k, b)]
        with torch.enable_grad():
            products = decayed_products(*inputs)
        grad_q, grad_k, grad_b = torch.autograd.grad(products, inputs, grad @ v.mT)
        at_start = (grad @ start.mT).mul_(since_start)
        at_end = (v @ after.mT).mul_(to_end)
        grad_v = k_end @ after
        grad_v += products.detach().mT @ grad
        grad_b.addcmul_(at_start, q)
        at_end_k = at_end * k
        grad_b -= at_end_k
        grad_b[..., -1, :] += at_end_k.sum(dim=-2) + (after * start).sum(dim=-1) * total[..., 0]
        grad_g = grad_b.flip(-2).cumsum(dim=-2).flip(-2)
        gradients = (grad_q.add_(at_start), grad_k.add_(at_end), grad_v, grad_g)
        return *(from_chunks(x) for x in gradients), grad_states[:, :, 0], None
