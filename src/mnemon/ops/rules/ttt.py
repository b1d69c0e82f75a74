"""TTT-linear: the memory is a small model, trained by gradient descent while it reads.

    f(x; W, b) = x + LN(x W + b);   l_t(W, b) = 1/2 |f(k_t; W, b) - v_t|^2
    (W, b)_t = (W, b)_{t-1} - lr_t dl_t/d(W, b) at (W, b)_s;   o_t = f(q_t; W_t, b_t)

where s is the token before the current mini-batch of `mini_batch_size` tokens: all gradients of a mini-batch are taken
at its start, which is what lets them be computed together. The mini-batch is part of the mathematics and is counted in
tokens of the sequence, wherever calls are cut, so the state carries the weights at its start and the place inside it.

The bias is the last row of the memory, read by a constant 1 appended to every query and key.

Source: Learning to (Learn at Test Time): RNNs with Expressive Hidden States, arXiv:2407.04620, sections 2.3-2.7; the
paper's eta is `lr`. As in the released layer, the rate of a token stays with the token's own gradient (the "column"
factor of its dual form) and f adds its input. The released layer's second factor, which rescales by the position of the
reading token inside the mini-batch, is left out: with it a write changes again after it was made, and the paper's
equations do not have it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mnemon.ops.declaration import Dimensions, GateSpec, HyperParameter, ParameterSpec, Source
from mnemon.ops.inner_model import fixed_weights
from mnemon.ops.rule import UpdateRule

_EPS = 1e-6  # of the inner LayerNorm, as in the released layer


class TTTState(NamedTuple):
    """Inner model while it is trained.

    Attributes:
        memory: weights W and, as the last row, bias b, [B, H, K + 1, V].
        anchor: the same at the start of the running mini-batch, where its gradients are taken.
        position: tokens of the running mini-batch seen so far, [B] int64, 0 to mini_batch_size - 1.
    """

    memory: Tensor
    anchor: Tensor
    position: Tensor


def init_state(
    dimensions: Dimensions,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    weight: Tensor,
    bias: Tensor,
    mini_batch_size: int,
) -> TTTState:
    """Build an inner model that has not read anything.

    Weights of zero would make the LayerNorm divide by its epsilon, so W starts at fixed weights and b at zero.
    """
    sequences, heads, key_dim, value_dim, _ = dimensions
    start = fixed_weights(heads, key_dim, value_dim, dtype, device)
    memory = F.pad(start, (0, 0, 0, 1)).expand(sequences, -1, -1, -1).contiguous()
    return TTTState(memory, memory, torch.zeros(sequences, dtype=torch.int64, device=device))


def step(
    state: TTTState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    weight: Tensor,
    bias: Tensor,
    mini_batch_size: int,
) -> tuple[Tensor, TTTState]:
    """Advance an inner model by one token.

        z = [k 1] A;   u = dl/dz;   M <- M - lr [k 1]^T u;   o = q + LN([q 1] M);   A <- M at the end of a mini-batch

    Args:
        state: inner model before the token (M its memory, A its anchor).
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V] with V = K.
        lr: step size, [B, H], at least 0.
        weight: weight of the inner LayerNorm, [H, V].
        bias: bias of the inner LayerNorm, [H, V].
        mini_batch_size: tokens whose gradients are taken at the same weights.

    Returns:
        Output [B, H, V] and the new state.

    Source:
        arXiv:2407.04620, sections 2.1 to 2.4.
    """
    k_bhk1, q_bhk1 = _with_one(k), _with_one(q)
    z_bhv = torch.einsum("bhkv,bhk->bhv", state.anchor, k_bhk1)
    # dl/dz through f(k) = k + LN(z), written out.
    centred_bhv = z_bhv - z_bhv.mean(-1, keepdim=True)
    scale_bh1 = (centred_bhv.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    hat_bhv = centred_bhv * scale_bh1
    error_bhv = (k + weight * hat_bhv + bias - v) * weight
    u_bhv = error_bhv - error_bhv.mean(-1, keepdim=True) - hat_bhv * (error_bhv * hat_bhv).mean(-1, keepdim=True)
    memory = state.memory - torch.einsum("bhk,bhv->bhkv", lr[..., None] * k_bhk1, scale_bh1 * u_bhv)
    position = state.position + 1
    full = position == mini_batch_size
    anchor = torch.where(full[:, None, None, None], memory, state.anchor)
    z_bhv = torch.einsum("bhkv,bhk->bhv", memory, q_bhk1)
    output = q + weight * F.layer_norm(z_bhv, z_bhv.shape[-1:], eps=_EPS) + bias
    return output, TTTState(memory, anchor, position % mini_batch_size)


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: TTTState,
    *,
    lr: Tensor,
    weight: Tensor,
    bias: Tensor,
    mini_batch_size: int,
    chunk_size: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, TTTState]:
    """Compute the rule a mini-batch at a time (its dual form), whatever the chunk size.

        U = dl/dZ at Z = [K 1] A;   Z_o = [Q 1] M - (tril([Q 1][K 1]^T) * lr) U;   M <- M - (lr [K 1])^T U

    A block of `mini_batch_size` tokens starts wherever the call starts. Where that is inside a mini-batch, the block
    holds the end of one mini-batch and the start of the next, and the gradients of the second part are taken at the
    weights in between.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: inner model before the first token.
        lr: step sizes, [B, T, H].
        weight: weight of the inner LayerNorm, [H, V].
        bias: bias of the inner LayerNorm, [H, V].
        mini_batch_size: tokens whose gradients are taken at the same weights.
        chunk_size: without effect: the mini-batch is the chunk.
        mask: False at the end of rows where a token does not count, [B, T]; None = all count.

    Returns:
        Output [B, T, H, V] and the state after the last token.

    Source:
        arXiv:2407.04620, section 2.5 (dual form).
    """
    tokens, size = q.shape[1], mini_batch_size
    blocks = -(-tokens // size)

    def split(x: Tensor) -> Tensor:
        """[B, T, H, d] -> [N, B, H, C, d], zeros after the last token."""
        padded = F.pad(x, (0, 0, 0, 0, 0, blocks * size - tokens))
        return padded.unflatten(1, (blocks, size)).permute(1, 0, 3, 2, 4)

    q_nbhck, k_nbhck, rate_nbhc1 = split(_with_one(q)), split(_with_one(k)), split(lr[..., None])
    reads = (q_nbhck @ k_nbhck.mT).tril() * rate_nbhc1.mT
    writes = (k_nbhck * rate_nbhc1).mT
    memory, anchor, position = state
    lengths = q.new_full(q.shape[:1], tokens, dtype=torch.int64) if mask is None else mask.sum(dim=1)
    left = size - position  # tokens of a block until the mini-batch is over, the same in every block
    ends = torch.arange(blocks, device=q.device)[:, None] * size + left <= lengths  # whether a block gets there, [N, B]
    ragged = bool(position.any())
    first = torch.arange(size, device=q.device)[:, None] < left[:, None, None, None]
    norm = weight[:, None, :], bias[:, None, :]
    outputs = []
    # unbind, not indexing: the backward of an index writes a gradient of the whole tensor for every block.
    parts = (q_nbhck, k_nbhck, split(v - k), reads, writes, ends)
    for query, key, target, read, write, is_over in zip(*(x.unbind(0) for x in parts), strict=True):
        u = _gradient(key @ anchor, target, *norm)
        if ragged:
            middle = memory - write @ u.masked_fill(~first, 0.0)
            u = torch.where(first, u, _gradient(key @ middle, target, *norm))
        outputs.append(query @ memory - read @ u)
        memory = memory - write @ u
        anchor = torch.where(is_over[:, None, None, None], middle if ragged else memory, anchor)
    z_bthv = torch.stack(outputs).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens]
    output = q + weight * F.layer_norm(z_bthv, z_bthv.shape[-1:], eps=_EPS) + bias
    return output, TTTState(memory, anchor, (position + lengths) % size)


def _with_one(x: Tensor) -> Tensor:
    """Append the constant that reads the bias: [..., K] -> [..., K + 1]."""
    return F.pad(x, (0, 1), value=1.0)


def _gradient(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Differentiate 1/2 |LN(z) - target|^2 by z, all [..., C, V]."""
    centred = z - z.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    hat = centred * scale
    error = (weight * hat + bias - target) * weight
    return scale * (error - error.mean(-1, keepdim=True) - hat * (error * hat).mean(-1, keepdim=True))


RULE = UpdateRule(
    name="ttt",
    equation="M ← M − lr [k 1]ᵀ∂l/∂z at A;  o = q + LN([q 1] M)",
    source=Source("Learning to (Learn at Test Time): RNNs with Expressive Hidden States", "2407.04620", "section 2"),
    gates=(
        GateSpec("lr", "head", "positive", identity=0.0, meaning="step size of the inner gradient descent", scale=0.1),
    ),
    parameters=(
        ParameterSpec("weight", ("H", "V"), "weight of the inner LayerNorm", initial=1.0),
        ParameterSpec("bias", ("H", "V"), "bias of the inner LayerNorm", initial=0.0),
    ),
    hyper_parameters=(
        HyperParameter("mini_batch_size", 16, "tokens whose gradients are taken at the same weights", minimum=1),
    ),
    init_state=init_state,
    step=step,
    chunkwise_form=chunkwise,
    state_size="2*(K + 1)*V",
    recurrent_flops="6*K*V + 30*V",
    chunkwise_flops="6*K*V + 2*mini_batch_size*(K + V) + 30*V",
    equal_widths=True,
    counts_tokens=True,
)
