"""Chunkwise form of a matrix memory whose tokens correct what they see of it, with momentum.

Momentum makes the state larger, and what a token sees, writes and reads a mixture of its parts Z_c; no more. With the
parts stacked in Z, k_t^T u_t the gradient of token t and every coefficient given:

    U = T^-1 (2 [K * seen_c] Z - 2 V);   T = I + 2 K K^T * seen_writes
    O = [Q * mix_c] Z - (Q K^T * writes) U;   Z_r <- sum over c of end_mix_rc Z_c - (K * end_writes_r)^T U

The gradient is written by hand and keeps two matrices per chunk beside its inputs: T^-1 and the first state.

Source: Titans: Learning to Memorize at Test Time, arXiv:2501.00663, section 3.1; the triangular system comes from
Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484, section 3.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemon.ops.chunking import unit_lower_inverse


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    seen: tuple[Tensor, Tensor],
    read: tuple[Tensor, Tensor],
    end: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Compute the chunks [B, H, N, C, ...] of a memory whose state has P parts.

    Args:
        q: queries, [B, H, N, C, K].
        k: keys, [B, H, N, C, K].
        v: values, [B, H, N, C, V].
        state: parts before the first token, one above the other, [B, H, P K, V].
        seen: what the residual of every token is taken at: shares of the parts before the chunk [B, H, N, C, P] and of
            the chunk's gradients [B, H, N, C, C], those of earlier tokens only.
        read: what every query reads: the same, with the token's own gradient.
        end: the parts after the chunk: the same, [B, H, N, P, P] and [B, H, N, P, C].

    Returns:
        Output [B, H, N, C, V] and the state after the last token.
    """
    output, after = _MomentumChunks.apply(q, k, v, state, *seen, *read, *end)
    return output, after


class _MomentumChunks(torch.autograd.Function):
    """Layout: [Q, N, ...], Q = B H rows, N chunks."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, state, seen_mix, seen_writes, mix, writes, end_mix, end_writes = (x.flatten(0, 1) for x in inputs)
        inverse = unit_lower_inverse((k @ k.mT).mul_(seen_writes).mul_(2))
        doubled = 2 * inverse
        u, u_state, written = doubled @ v, doubled @ _spread(k, seen_mix), _spread(k, end_writes.mT)
        start = state.new_empty(*u.shape[:2], *state.shape[1:])
        for n in range(u.shape[1]):  # u becomes U chunk by chunk
            start[:, n] = state
            u[:, n] = u_n = torch.baddbmm(u[:, n], u_state[:, n], state, beta=-1)
            state = _mixed(end_mix[:, n], state).baddbmm_(written[:, n].mT, u_n, alpha=-1)
        output = _spread(q, mix) @ start
        _subtract(output, (q @ k.mT).mul_(writes), u)
        ctx.save_for_backward(*inputs, inverse, start)
        return output.view_as(inputs[2]), state.view_as(inputs[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_after: Tensor) -> tuple[Tensor, ...]:
        *inputs, inverse, start = ctx.saved_tensors
        q, k, v, _, seen_mix, seen_writes, mix, writes, end_mix, end_writes = (x.flatten(0, 1) for x in inputs)
        grad = grad_output.flatten(0, 1)
        doubled = 2 * inverse
        u_state, written = doubled @ _spread(k, seen_mix), _spread(k, end_writes.mT)
        u = _subtract(u_state @ start, doubled, v)

        qk = q @ k.mT
        grad_u = (qk * writes).mT @ grad
        grad_start = _spread(q, mix).mT @ grad
        after, state = torch.empty_like(start), grad_after.flatten(0, 1)
        for n in range(u.shape[1] - 1, -1, -1):
            after[:, n] = state
            grad_u[:, n] = grad_n = torch.baddbmm(grad_u[:, n], written[:, n], state).neg_()
            state = _mixed(end_mix[:, n].mT, state).add_(grad_start[:, n])
            state.baddbmm_(u_state[:, n].mT, grad_n)

        y = doubled.mT @ grad_u  # gradient of half the system's right side
        of_system = -(y @ u.mT)
        of_read = -(grad @ u.mT)
        grad_seen_writes, grad_writes = of_system * (k @ k.mT), of_read * qk
        of_system.mul_(seen_writes)
        of_read.mul_(writes)
        grad_k, grad_seen_mix = _unspread(y @ start.mT, k, seen_mix)
        of_written, grad_end_writes = _unspread(u @ after.mT, k, end_writes.mT)
        grad_q, grad_mix = _unspread(grad @ start.mT, q, mix)
        grad_q += of_read @ k
        grad_k += (of_system + of_system.mT) @ k
        grad_k += of_read.mT @ q
        grad_k -= of_written
        grad_end_mix = _parts(after, end_mix.shape[-1]) @ _parts(start, end_mix.shape[-1]).mT
        gradients = (
            *(grad_q, grad_k, y.neg_(), state, grad_seen_mix, grad_seen_writes, grad_mix, grad_writes, grad_end_mix),
            grad_end_writes.mT.neg(),
        )
        return tuple(gradient.reshape(x.shape) for gradient, x in zip(gradients, inputs, strict=True))


def _spread(x: Tensor, shares: Tensor) -> Tensor:
    """Put multiples of x [..., C, K] side by side, one for each of the shares [..., C, P]: [..., C, P K]."""
    return (shares[..., None] * x[..., None, :]).flatten(-2)


def _unspread(grad: Tensor, x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the shares, given that of `_spread`."""
    grad = grad.unflatten(-1, (shares.shape[-1], x.shape[-1]))
    return (shares[..., None] * grad).sum(dim=-2), (grad * x[..., None, :]).sum(dim=-1)


def _parts(state: Tensor, parts: int) -> Tensor:
    """View the parts of states [..., P K, V] as vectors, [..., P, K V]."""
    return state.flatten(-2).unflatten(-1, (parts, -1))


def _mixed(mix: Tensor, state: Tensor) -> Tensor:
    """Mix the parts of a state [Q, P K, V] by the shares [Q, P, P]."""
    return (mix @ _parts(state, mix.shape[-1])).view_as(state)


def _subtract(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Subtract A B from X in place."""
    x.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=-1)
    return x
