"""Chunkwise form of the delta rules: memories that write the error of what they recall.

With a decay a_t (none, a number or a vector over key channels):

    S' = a_t S_{t-1};   S_t = S' + k_t^T u_t;   u_t = beta_t (v_t - k_t S')

Inside a chunk, u depends on earlier u through a unit lower triangular system (the WY representation), whose solution is
affine in the chunk's first state: X = U - W S. Everything but a short recurrence over chunk states is computed for all
chunks at once.

The gradient is written by hand. It keeps two matrices per chunk, the inverse of the system and the first state, and
computes everything else again: on a CPU, touching fresh memory costs more than these products.

Layout: chunk-major, `[N, Q, C, ...]`, N chunks, Q = B H rows, so that the chunks of one time stand together.

Source: Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484, section 3; Gated
Delta Networks, arXiv:2412.06464, section 3.3; Kimi Linear, arXiv:2510.26692, section 3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemon.ops.channel_decay import ChannelDecay
from mnemon.ops.chunking import add_product, pairwise_decay, unit_lower_inverse


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
    if g is not None and g.ndim == k.ndim:
        chunk_size &= -chunk_size  # `ChannelDecay` joins spans of tokens in pairs
    output, after = _DeltaChunks.apply(q, k, v, beta, g, state, chunk_size)
    return output, after


class _Decayed(NamedTuple):
    """What the decay makes of queries and keys within a chunk; everything is [N, Q, ...].

    Attributes:
        qk: q_i . k_j, decayed from j to i, for j <= i, [C, C].
        kk: k_i . k_j, the same; what stands on and above the diagonal is ignored, [C, C].
        q_start: queries times the decay since the chunk's first state, [C, K].
        k_start: keys, the same, [C, K].
        k_end: keys times the decay up to the chunk's end, [C, K].
        total: decay over the whole chunk, [K, 1] or [1, 1]; None is no decay.
    """

    qk: Tensor
    kk: Tensor
    q_start: Tensor
    k_start: Tensor
    k_end: Tensor
    total: Tensor | None


class _DeltaChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        qc, kc, vc, bc = (_to_chunks(x, chunk_size) for x in (q, k, v, beta[..., None]))
        d = _decay(qc, kc, None if g is None else _to_chunks(g, chunk_size), for_gradient=False).pieces
        inverse = unit_lower_inverse(bc * d.kk)
        u, w = _solve(inverse, bc, vc, d.k_start)
        x = u  # becomes X chunk by chunk
        states = state.new_empty(x.shape[0] + 1, x.shape[1], *state.shape[2:])
        states[0] = state.flatten(0, 1)
        before, *afters = states.unbind()
        totals = [None] * len(x) if d.total is None else d.total.unbind()
        for x_n, w_n, k_n, total_n, after in zip(x, w, d.k_end.mT, totals, afters, strict=True):
            x_n.baddbmm_(w_n, before, alpha=-1)
            torch.mul(before, 1.0 if total_n is None else total_n, out=after)
            before = after.baddbmm_(k_n, x_n)
        output = d.q_start @ states[:-1]
        add_product(output, d.qk, x)
        ctx.save_for_backward(q, k, v, beta, g, inverse, states)
        return _from_chunks(output, v.shape), states[-1].reshape(state.shape).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, g, inverse, states = ctx.saved_tensors
        chunk_size = inverse.shape[-1]
        qc, kc, vc, bc, grad = (_to_chunks(x, chunk_size) for x in (q, k, v, beta[..., None], grad_output))
        decay = _decay(qc, kc, None if g is None else _to_chunks(g, chunk_size), for_gradient=True)
        d = decay.pieces
        u, w = _solve(inverse, bc, vc, d.k_start)
        start = states[:-1]
        x = _subtract(u.clone(), w, start)

        grad_x = d.qk.mT @ grad
        grad_states = torch.empty_like(states)
        torch.matmul(d.q_start.mT, grad, out=grad_states[:-1])
        grad_states[-1] = grad_state.flatten(0, 1)
        *befores, after = grad_states.unbind()
        totals = [None] * len(x) if d.total is None else d.total.unbind()
        chunks = list(zip(grad_x, w.mT, d.k_end, totals, befores, strict=True))
        for grad_n, w_n, k_n, total_n, before in reversed(chunks):
            grad_n.baddbmm_(k_n, after)
            before.baddbmm_(w_n, grad_n, alpha=-1)
            after = before.add_(after) if total_n is None else before.addcmul_(after, total_n)
        after = grad_states[1:]

        # The system: (I + A) [U W] = R.  With Y = (I + A)^-T grad [U W], grad R = Y and grad A = -Y [U W]^T.
        y_v = inverse.mT @ grad_x
        y_k = inverse.mT @ (grad_x @ start.mT)  # with its sign turned: grad W = -grad X S^T
        minus_grad_a = _subtract(y_v @ u.mT, y_k, w.mT).tril_(-1)
        grad_beta = (y_v * vc).sum(-1) - (y_k * d.k_start).sum(-1) - (minus_grad_a * d.kk).sum(-1)
        gradients = _Decayed(
            qk=grad @ x.mT,
            kk=minus_grad_a.mul_(-bc),
            q_start=grad @ start.mT,
            k_start=y_k.mul_(-bc),
            k_end=x @ after.mT,
            total=None if d.total is None else (after * start).sum(-1, keepdim=True).sum_to_size(d.total.shape),
        )
        grad_q, grad_k, grad_g = decay.backward(gradients)
        return (
            _from_chunks(grad_q, q.shape),
            _from_chunks(grad_k, k.shape),
            _from_chunks(y_v.mul_(bc), v.shape),
            _from_chunks(grad_beta, beta.shape),
            None if g is None or grad_g is None else _from_chunks(grad_g, g.shape),
            grad_states[0].reshape(grad_state.shape),
            None,
        )


def _to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """Cut [B, T, H, ...] into chunks [N, B H, C, ...]."""
    batch, tokens, heads = x.shape[:3]
    parts = x.reshape(batch, tokens // chunk_size, chunk_size, heads, *x.shape[3:])
    return parts.movedim((1, 3), (0, 2)).flatten(1, 2).contiguous()


def _from_chunks(x: Tensor, shape: torch.Size) -> Tensor:
    """Join chunks [N, B H, C, ...] to [B, T, H, ...]."""
    return x.unflatten(1, (shape[0], shape[2])).movedim((0, 2), (1, 3)).reshape(shape)


def _solve(inverse: Tensor, beta: Tensor, v: Tensor, k_start: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and W, the solutions for beta * V and beta * K_start."""
    scaled = inverse * beta.mT
    return scaled @ v, scaled @ k_start


def _subtract(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Subtract A B from X in place."""
    x.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=-1)
    return x


def _decay(q: Tensor, k: Tensor, g: Tensor | None, *, for_gradient: bool) -> "_HeadDecay | _KeyDecay":
    """Apply the decay g [N, Q, C] or [N, Q, C, K] of chunks, or none, to their queries and keys [N, Q, C, K]."""
    if g is not None and g.ndim == k.ndim:
        return _KeyDecay(q, k, g, for_gradient)
    return _HeadDecay(q, k, g)


class _HeadDecay:
    """A decay per head, or none."""

    def __init__(self, q: Tensor, k: Tensor, g: Tensor | None) -> None:
        self.q, self.k = q, k
        if g is None:
            self.b = None
            self.pieces = _Decayed((q @ k.mT).tril_(), k @ k.mT, q, k, k, None)
            return
        self.b = b = g.cumsum(dim=-1)
        self.pairs = pairwise_decay(b)
        self.since_start, self.to_end = b.exp()[..., None], (b[..., -1:] - b).exp()[..., None]
        self.pieces = _Decayed(
            qk=(q @ k.mT).mul_(self.pairs),
            kk=(k @ k.mT).mul_(self.pairs),
            q_start=q * self.since_start,
            k_start=k * self.since_start,
            k_end=k * self.to_end,
            total=self.since_start[..., -1:, :],
        )

    def backward(self, grad: _Decayed) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of q, k and g; those of the pieces are used up.

        The decay acts only as a factor exp(b_i) of a query or of a key that asks, and exp(-b_j) of a key that was
        written, so its gradient is what these have: db_i = q_i . dq_i + k_i . dk_i as one that asks - as one written.
        """
        if self.b is None:
            grad_qk = grad.qk.tril_()
            grad_q, asking, written = grad.q_start, grad.k_start, grad.k_end
        else:
            assert grad.total is not None
            assert self.pieces.total is not None
            grad_qk = grad.qk.mul_(self.pairs)
            grad.kk.mul_(self.pairs)
            grad_q, asking = grad.q_start.mul_(self.since_start), grad.k_start.mul_(self.since_start)
            written = grad.k_end.mul_(self.to_end)
            grad_end = (written * self.k).sum(dim=(-2, -1)) + (grad.total * self.pieces.total).flatten(-2).sum(-1)
        add_product(grad_q, grad_qk, self.k)
        add_product(asking, grad.kk, self.k)
        add_product(written, grad_qk.mT, self.q)
        add_product(written, grad.kk.mT, self.k)
        if self.b is None:
            return grad_q, asking + written, None
        grad_b = (grad_q * self.q).sum(-1) + ((asking - written) * self.k).sum(-1)
        grad_b[..., -1] += grad_end
        return grad_q, asking.add_(written), grad_b.flip(-1).cumsum(-1).flip(-1)


class _KeyDecay:
    """A decay per key channel."""

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, for_gradient: bool) -> None:
        self.decay = ChannelDecay([q, k], k, g, keep=for_gradient)
        (qk, kk), (q_start, k_start) = self.decay.products, self.decay.since_start
        self.pieces = _Decayed(qk, kk, q_start, k_start, self.decay.to_end, self.decay.total.mT)

    def backward(self, grad: _Decayed) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of q, k and g; those of the pieces are used up."""
        assert grad.total is not None
        (grad_q, asking), written, grad_g = self.decay.backward(
            [grad.qk, grad.kk], [grad.q_start, grad.k_start], grad.k_end, grad.total.mT
        )
        return grad_q, written.add_(asking), grad_g
