"""Gated slot attention: keys and values are written into J slots, and queries attend to the slots.

    K_t = Diag(exp g_t) K_{t-1} + s_t^T k_t;   V_t = Diag(exp g_t) V_{t-1} + s_t^T v_t;   o_t = softmax(q_t K_t^T) V_t

Two memories with one decay per slot, joined by a softmax over the slots: the first decays its columns (slots are what
it returns), the second its rows (slots are what it is asked for). The published model ties the write strength to the
decay, s = 1 - exp g, which keeps every slot a weighted mean; here both are given.

Source: Gated Slot Attention for Efficient Linear-Time Sequence Modeling, arXiv:2409.07146, section 3; alpha there is
exp(g) here, and 1 - alpha is s.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemon.ops import vector_decay
from mnemon.ops.channel_decay import cross_products, half_sizes, halves
from mnemon.ops.chunking import decay_between, from_chunks, to_chunks
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
    """Compute the memory of the keys, then the softmax, then the memory of the values, each in chunks.

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
    scores, keys = read_decaying_columns(q, k, s, state.keys, g=g, chunk_size=chunk_size)
    output, values = vector_decay.chunkwise(scores.softmax(dim=-1), s, v, state.values, g=g, chunk_size=chunk_size)
    return output, GSAState(keys, values)


def read_decaying_columns(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, g: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute a memory whose columns decay for whole chunks: S_t = S_{t-1} Diag(exp g_t) + k_t^T v_t;  o_t = q_t S_t.

    With b the cumulative sum of g within a chunk (a row per token):

        O_i = exp(b_i) * (Q S)_i + sum over j <= i of (q_i . k_j) exp(b_i - b_j) * v_j

    Between the halves of a span of tokens the exponential is split at the end n of the first half, into exp(b_i - b_n)
    and exp(b_n - b_j), which have exponents of at most 0; the halves are split again, down to single tokens.

    Args:
        q: queries, [B, T, H, K], T a multiple of `chunk_size`.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: memory S before the first token, [B, H, K, V].
        g: log decay of the columns, [B, T, H, V].
        chunk_size: tokens per chunk.

    Returns:
        Output [B, T, H, V] and the memory after the last token.
    """
    size = chunk_size & -chunk_size  # the largest power of two in it can be halved down to one token
    q, k, v, g = (to_chunks(x, size) for x in (q, k, v, g))
    b = g.cumsum(dim=-2)
    end = b[..., -1, :]
    written = k.mT @ (v * (end[..., None, :] - b).exp())  # [B, H, N, K, V]
    additions = torch.cat([state[:, :, None], written], dim=2).movedim(-1, 2)  # [B, H, V, N + 1, K]
    states = (decay_between(end.mT) @ additions).movedim(2, -1)
    inside: Tensor = _Inside.apply(q @ k.mT, v, b)
    return from_chunks(b.exp() * (q @ states[:, :, :-1]) + inside), states[:, :, -1]


class _Inside(torch.autograd.Function):
    """O_i = sum over j <= i of P_ij exp(b_i - b_j) * v_j within chunks of a power of two of tokens."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, v: Tensor, b: Tensor) -> Tensor:
        output = products.diagonal(dim1=-2, dim2=-1)[..., None] * v
        for half in half_sizes(b.shape[-2]):
            from_middle, to_middle = _split_decay(b, half)
            read = cross_products(products, half) @ (halves(v, half)[0] * to_middle)
            halves(output, half)[1].addcmul_(read, from_middle)
        ctx.save_for_backward(products, v, b, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        products, v, b, output = ctx.saved_tensors
        grad_products = torch.zeros_like(products)
        grad_products.diagonal(dim1=-2, dim2=-1).copy_((grad * v).sum(dim=-1))
        grad_v = products.diagonal(dim1=-2, dim2=-1)[..., None] * grad
        for half in half_sizes(b.shape[-2]):
            from_middle, to_middle = _split_decay(b, half)
            grad_read = halves(grad, half)[1] * from_middle
            cross_products(grad_products, half).copy_(grad_read @ (halves(v, half)[0] * to_middle).mT)
            halves(grad_v, half)[0].addcmul_(cross_products(products, half).mT @ grad_read, to_middle)
        # b_i enters only as exp(b_i) on the output and exp(-b_i) on v_i.
        return grad_products, grad_v, output * grad - v * grad_v


def _split_decay(b: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return the decay from every span's middle to the tokens of its second half, and from those of its first to it."""
    first, second = halves(b, half)
    middle = first[..., -1:, :]
    return (second - middle).exp_(), (middle - first).exp_()


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
)
