"""Gated slot attention: keys and values are written into J slots, and queries attend to the slots.

    K_t = Diag(exp g_t) K_{t-1} + s_t^T k_t;   V_t = Diag(exp g_t) V_{t-1} + s_t^T v_t;   o_t = softmax(q_t K_t^T) V_t

Two memories with one decay per slot, joined by a softmax over the slots: the first decays its columns (slots are what
it returns), the second its rows (slots are what it is asked for). The published model ties the write strength to the
decay, s = 1 - exp g, which keeps every slot a weighted mean; here both are given.

Source: Gated Slot Attention for Efficient Linear-Time Sequence Modeling, arXiv:2409.07146, section 3; alpha there is
exp(g) here, and 1 - alpha is s.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemon.ops.channel_decay import cross_products, half_sizes
from mnemon.ops.chunking import (
    add_product,
    chunk_states,
    from_chunks,
    product,
    sum_from_token,
    to_chunks,
    view_chunks,
)
from mnemon.ops.declaration import Dimensions, FlaForm, GateSpec, Source
from mnemon.ops.kernels import fla
from mnemon.ops.rule import UpdateRule


class GSAState(NamedTuple):
    """Contents of the slots.

    Attributes:
        keys: the slots' keys, [B, H, K, J].
        values: the slots' values, [B, H, J, V].
    """

    keys: Tensor
    values: Tensor


def init_state(dimensions: Dimensions, dtype: torch.dtype, device: torch.device | str) -> GSAState:
    """Return empty slots."""
    sequences, heads, key_dim, value_dim, slots = dimensions
    return GSAState(
        torch.zeros(sequences, heads, key_dim, slots, dtype=dtype, device=device),
        torch.zeros(sequences, heads, slots, value_dim, dtype=dtype, device=device),
    )


def step(state: GSAState, q: Tensor, k: Tensor, v: Tensor, *, s: Tensor, g: Tensor) -> tuple[Tensor, GSAState]:
    """Fade the slots, write one token into them, then attend to them.

    Args:
        state: contents before the token.
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        s: write strength per slot, [B, H, J].
        g: natural-log decay per slot, [B, H, J], at most 0.

    Returns:
        Output [B, H, V] and the new contents.
    """
    kept = g.exp()
    keys = kept[..., None, :] * state.keys + k[..., :, None] * s[..., None, :]
    values = kept[..., :, None] * state.values + s[..., :, None] * v[..., None, :]
    weights = torch.einsum("bhk,bhkj->bhj", q, keys).softmax(dim=-1)
    return torch.einsum("bhj,bhjv->bhv", weights, values), GSAState(keys, values)


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, state: GSAState, *, s: Tensor, g: Tensor, chunk_size: int
) -> tuple[Tensor, GSAState]:
    """Compute the rule for whole chunks.

    Both memories decay alike, slot by slot, so they are one memory M = [K^T V] with a row per slot. With b the
    cumulative sum of g within a chunk (a row per token):

        Z_i = exp(b_i) * (q_i K) + sum over j <= i of (q_i . k_j) exp(b_i - b_j) * s_j;   P = softmax(Z)
        O = (P * exp(b)) V + A [v_1 ... v_C];   A_ij = sum over slots c of P_ic exp(b_ic - b_jc) s_jc for j <= i
        M <- Diag(exp(b_C)) M + (s * exp(b_C - b))^T [k v]

    Args:
        q: queries, [B, T, H, K], T a multiple of `chunk_size`.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: contents before the first token.
        s: write strength, [B, T, H, J].
        g: log decay, [B, T, H, J].
        chunk_size: tokens per chunk.

    Returns:
        Output [B, T, H, V] and the contents after the last token.
    """
    size = chunk_size & -chunk_size  # spans of tokens are joined in pairs
    output, keys, values = _SlotChunks.apply(q, k, v, s, g, state.keys, state.values, size)
    return output, GSAState(keys, values)


class _SlotChunks(torch.autograd.Function):
    """`chunkwise`, keeping its inputs only.

    The log decay needs no products of its own. It acts as a factor exp(b_i) of scores and weights, and as exp(-b_j) of
    writes, so with Z and P as in `chunkwise`

        db_i = Z_i * dZ_i + P_i * dP_i - s_i * ds_i,   and for the chunk's last b also what exp(b_C) scales.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, keys: Tensor, values: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, s, g, keys, values)
        ctx.chunk_size = chunk_size
        c = _Scores(q, k, v, s, g, keys, values, chunk_size)
        weights = c.scores.softmax(dim=-1)
        output = torch.bmm(weights * c.decay.since_start, c.v_start)
        output.baddbmm_(c.decay.products(weights), c.v)
        after_k, after_v = c.after.split(c.widths, dim=-1)
        return c.tokens(output), after_k.mT.contiguous(), after_v.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, s, g, keys, values = ctx.saved_tensors
        c = _Scores(q, k, v, s, g, keys, values, ctx.chunk_size)
        decay, grad = c.decay, to_chunks(grad_output, ctx.chunk_size).flatten(0, 2)
        weights = c.scores.softmax(dim=-1)

        of_values = decay.pairs(torch.bmm(grad, c.v.mT))
        products, grad_weights = decay.backward_weights(weights, of_values, torch.bmm(grad, c.v_start.mT))
        grad_b = weights * grad_weights
        grad_scores = torch.addcmul(grad_b, weights, grad_b.sum(dim=-1, keepdim=True), value=-1)
        grad_b.addcmul_(c.scores, grad_scores)

        asking = grad_scores * decay.since_start
        grad_q = torch.bmm(asking, c.k_start)
        asking_k = torch.bmm(asking.mT, c.q)
        torch.mul(weights, decay.since_start, out=asking)
        asked = torch.cat([asking_k, torch.bmm(asking.mT, grad)], dim=-1)
        after, before = c.states(asked, _joined(grad_keys, grad_values), backwards=True)
        k_after, v_after = after.split(c.widths, dim=-1)

        grad_to_end = torch.bmm(c.kv, after.mT)
        through_end = (grad_to_end * decay.to_end).sum(dim=-2)
        through_end.addcmul_((after * c.start).sum(dim=-1), decay.total)
        grad_asked, grad_s = decay.backward_writes(weights, of_values, grad_scores, c.asked, grad_to_end)
        grad_b.addcmul_(c.s, grad_s, value=-1)
        grad_b[:, -1] += through_end

        grad_q.baddbmm_(grad_asked, c.k)
        grad_k = torch.bmm(decay.to_end, k_after).baddbmm_(grad_asked.mT, c.q)
        grad_v = torch.bmm(decay.to_end, v_after).baddbmm_(products.mT, grad)
        before_k, before_v = before.split(c.widths, dim=-1)
        gradients = (grad_q, grad_k, grad_v, grad_s, sum_from_token(grad_b))
        return *(c.tokens(x) for x in gradients), before_k.mT, before_v, None


class _Scores:
    """Chunks up to their scores, which both directions compute; Q = B H N chunks stand side by side.

    Attributes:
        widths: K and V.
        q, k, v, s: tokens of the chunks, [Q, C, ...]; kv: keys and values side by side.
        decay: the decay within chunks.
        start: M before every chunk, [Q, J, K + V]; k_start, v_start: its parts.
        after: M after the last chunk, [B, H, J, K + V].
        asked: q_i . k_j.
        scores: Z, [Q, C, J].
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, keys: Tensor, values: Tensor, chunk_size: int
    ) -> None:
        self.widths = [k.shape[-1], v.shape[-1]]
        cut = to_chunks(q, chunk_size)
        self._rows = cut.shape[:3]
        self.q = cut.flatten(0, 2)
        self.s, g = (to_chunks(x, chunk_size).flatten(0, 2) for x in (s, g))
        self.kv = torch.cat([view_chunks(x, chunk_size) for x in (k, v)], dim=-1).flatten(0, 2)
        self.k, self.v = self.kv.split(self.widths, dim=-1)
        self.decay = _SlotDecay(self.s, g)
        self.start, self.after = self.states(torch.bmm(self.decay.to_end.mT, self.kv), _joined(keys, values))
        self.k_start, self.v_start = self.start.split(self.widths, dim=-1)
        self.asked = self.decay.pairs(torch.bmm(self.q, self.k.mT))
        self.scores = self.decay.read(self.asked, torch.bmm(self.q, self.k_start.mT))

    def states(self, added: Tensor, state: Tensor, *, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """Call `chunk_states` with what chunks add, [Q, J, D]; returns [Q, J, D] and [B, H, J, D]."""
        total = self.decay.total.unflatten(0, self._rows)[..., None]
        met, left = chunk_states(added.unflatten(0, self._rows), total, state, backwards=backwards)
        return met.flatten(0, 2), left

    def tokens(self, x: Tensor) -> Tensor:
        """View chunks [Q, C, D] as [B, T, H, D]."""
        return from_chunks(x.unflatten(0, self._rows))


def _joined(keys: Tensor, values: Tensor) -> Tensor:
    """Put keys [B, H, K, J] and values [B, H, J, V] of the slots side by side, [B, H, J, K + V]."""
    return torch.cat([keys.mT, values], dim=-1)


class _Pairs(NamedTuple):
    """A number for every pair of a chunk's tokens i and j <= i.

    Attributes:
        own: where j = i, [Q, C, 1].
        across: for spans of 2, 4, ... C tokens, i in the second half and j in the first, [Q C / 2 half, half, half].
    """

    own: Tensor
    across: list[Tensor]


class _Span(NamedTuple):
    """Spans of 2 `half` tokens; m is the last token of the first half. Everything is [Q C / 2 half, ...].

    Attributes:
        half: tokens of a half.
        from_middle: exp(b_i - b_m) for the tokens of the second half, [half, J].
        written: s_j exp(b_m - b_j) for the tokens of the first half, [half, J].
        first: decay over the first half, [1, J].
        second: decay over the second half, [1, J].
    """

    half: int
    from_middle: Tensor
    written: Tensor
    first: Tensor
    second: Tensor


class _SlotDecay:
    """The decay of the slots within chunks, and the writes under it, in the joins of `mnemon.ops.channel_decay`.

    Attributes:
        since_start: exp(b_i), [Q, C, J].
        to_end: s_j exp(b_C - b_j), [Q, C, J].
        total: exp(b_C), [Q, J].
    """

    def __init__(self, s: Tensor, g: Tensor) -> None:
        self._s, self._step = s, g.exp()
        self._spans: list[_Span] = []
        self.since_start, self.to_end, total = self._step.clone(), s.clone(), self._step
        for half in half_sizes(s.shape[-2]):
            later, earlier = _halves(self.since_start, half)[1], _halves(self.to_end, half)[0]
            first, second = _halves(total, 1)
            self._spans.append(_Span(half, later.clone(), earlier.clone(), first, second))
            later *= first
            earlier *= second
            total = first * second
        self.total = total.flatten(0, -2)

    def pairs(self, products: Tensor) -> _Pairs:
        """Take the pairs out of [Q, C, C]; what stands above the diagonals is ignored."""
        across = [cross_products(products, span.half).flatten(0, 1) for span in self._spans]
        return _Pairs(products.diagonal(dim1=-2, dim2=-1)[..., None], across)

    def read(self, asked: _Pairs, scores: Tensor) -> Tensor:
        """Return exp(b_i) * scores_i + sum over j <= i of asked_ij exp(b_i - b_j) * s_j, in place of the scores."""
        scores.mul_(self.since_start).addcmul_(asked.own, self._s)
        for across, (half, from_middle, written, *_) in zip(asked.across, self._spans, strict=True):
            _halves(scores, half)[1].addcmul_(product(across, written), from_middle)
        return scores

    def products(self, x: Tensor) -> Tensor:
        """Return sum over slots c of x_ic exp(b_ic - b_jc) s_jc for j <= i, else 0, [Q, C, C], for x [Q, C, J]."""
        products = self._own_products(x)
        for half, from_middle, written, *_ in self._spans:
            _write_across(products, (_halves(x, half)[1] * from_middle), written)
        return products

    def backward_weights(self, weights: Tensor, grad_products: _Pairs, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return `products(weights)` and the gradient of the weights.

        Args:
            weights: [Q, C, J].
            grad_products: gradient of `products(weights)`.
            grad: gradient of weights * exp(b), [Q, C, J]; used up.
        """
        products = self._own_products(weights)
        for across, (half, from_middle, written, first, _) in self._down(grad_products.across):
            _write_across(products, _halves(weights, half)[1] * from_middle, written)
            grad_later = _halves(grad, half)[1]
            torch.addcmul(product(across, written), grad_later, first, out=grad_later)
        return products, grad.mul_(self._step).addcmul_(grad_products.own, self._s)

    def backward_writes(
        self, weights: Tensor, of_values: _Pairs, grad_scores: Tensor, asked: _Pairs, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of what is asked, [Q, C, C], and that of s.

        Args:
            weights: P, [Q, C, J].
            of_values: gradient of `products(weights)`.
            grad_scores: gradient of Z, [Q, C, J].
            asked: q_i . k_j.
            grad: gradient of `to_end`, [Q, C, J]; used up.
        """
        grad_asked = self._own_products(grad_scores)
        for values, keys, (half, from_middle, written, _, second) in self._down(of_values.across, asked.across):
            reading = _halves(weights, half)[1] * from_middle
            asking = _halves(grad_scores, half)[1] * from_middle
            _write_across(grad_asked, asking, written)
            grad_written = product(values.mT, reading)
            add_product(grad_written, keys.mT, asking)
            earlier = _halves(grad, half)[0]
            torch.addcmul(grad_written, earlier, second, out=earlier)
        return grad_asked, grad.addcmul_(of_values.own, weights).addcmul_(asked.own, grad_scores)

    def _down(self, *across: list[Tensor]) -> Iterator[tuple[Any, ...]]:
        """Go from the longest spans to the shortest."""
        return reversed(list(zip(*across, self._spans, strict=True)))

    def _own_products(self, x: Tensor) -> Tensor:
        """Return the diagonal of `products`, the rest being 0."""
        products = x.new_zeros(*x.shape[:-1], x.shape[-2])
        products.diagonal(dim1=-2, dim2=-1).copy_((x * self._s).sum(dim=-1))
        return products


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """View [M, C, J] as first and second halves of spans of 2 `half` tokens, each [M C / 2 half, half, J]."""
    first, second = x.view(x.shape[0] * x.shape[1] // (2 * half), 2, half, x.shape[2]).unbind(1)
    return first, second


def _write_across(products: Tensor, asking: Tensor, written: Tensor) -> None:
    """Write what second halves see of first halves into [M, C, C]."""
    target = cross_products(products, asking.shape[1])
    target.copy_(torch.bmm(asking, written.mT).view(target.shape))


def _fla(
    q: Tensor, k: Tensor, v: Tensor, state: GSAState, cu_seqlens: Tensor | None, *, s: Tensor, g: Tensor
) -> tuple[Tensor, GSAState]:
    # The slots are a matrix operand of its kernels, so the write strength has the dtype of the values there.
    output, final = fla.call("gsa", "chunk_gsa", q, k, v, state, cu_seqlens, s=s.to(v.dtype), g=g)
    return output, GSAState(*final)


RULE = UpdateRule(
    name="gsa",
    equation="K ← Diag(eᵍ)K + sᵀk;  V ← Diag(eᵍ)V + sᵀv;  o = softmax(q Kᵀ)V",
    source=Source("Gated Slot Attention for Efficient Linear-Time Sequence Modeling", "2409.07146", "section 3"),
    gates=(
        GateSpec("s", "slot", "unit", identity=0.0, meaning="write strength per slot"),
        GateSpec("g", "slot", "log_decay", identity=0.0, meaning="log decay per slot"),
    ),
    init_state=init_state,
    step=step,
    state_size="J*(K + V)",
    recurrent_flops="5*J*(K + V) + 5*J",
    chunkwise_flops="4*J*(K + V) + 2*C*(K + 2*J + V) + 5*J",
    chunkwise_form=chunkwise,
    fla_form=FlaForm(_fla),
    light_backward=True,
    linear_tensors=(1,),
)
