"""Titans: a memory trained by gradient descent with momentum and forgetting while it reads.

    l_t(M) = |f(k_t; M) - v_t|^2;   S_t = momentum_t S_{t-1} - lr_t dl_t(M_s);   M_t = exp(g_t) M_{t-1} + S_t
    o_t = f(q_t; M_t)

The memory f is a matrix, f(x) = x M, or a two-layer network, f(x) = gelu(x W_1) W_2 (`memory="mlp"`). The gradient of
token t is taken at M_s, the memory before the token's mini-batch of `mini_batch_size` tokens. The default of 1 is the
paper's equation, where s = t - 1. A longer mini-batch is another recurrence, not a faster way to compute this one; for
the network it is the only one with matrix products over tokens.

For the matrix every mini-batch size has an exact chunkwise form. What token t sees, M_s, is linear in the state before
the chunk and in the residuals u_j of earlier tokens, so the residuals of a chunk solve one unit-triangular system, as
in DeltaNet; momentum only changes its coefficients.

A step moves the memory even without a write, because the momentum is added to it, so no input can express a masked
token.

Source: Titans: Learning to Memorize at Test Time, arXiv:2501.00663, section 3.1; the paper's theta, eta and
1 - alpha are `lr`, `momentum` and exp(g) here. Its loss has no factor 1/2, hence the factors 2 below.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mnemon.ops import momentum_delta
from mnemon.ops.chunking import from_chunks, pairwise_decay, to_chunks
from mnemon.ops.declaration import Dimensions, GateSpec, HyperParameter, Source
from mnemon.ops.inner_model import fixed_weights
from mnemon.ops.rule import UpdateRule
from mnemon.ops.state import combine


class TitansState(NamedTuple):
    """Memory while it is trained. R x W is K x V for a matrix; for a network (K + V) x hidden: W_1 above, W_2^T below.

    Attributes:
        memory: the memory M, [B, H, R, W].
        momentum: the running step S, [B, H, R, W].
        anchor: M at the start of the running mini-batch, [B, H, R, W]; R = 0 if a mini-batch is one token.
        position: tokens of the running mini-batch seen so far, [B] int64, 0 to mini_batch_size - 1.
    """

    memory: Tensor
    momentum: Tensor
    anchor: Tensor
    position: Tensor


class _Shares(NamedTuple):
    """What some states in or after a chunk are made of, [B, H, N, R, ...] for R states.

        state_r = sum over c of mix_rc Z_c - sum over tokens j of writes_rj dl_j

    Z being the memory, the momentum and (for mini-batches of several tokens) the anchor before the chunk.

    Attributes:
        mix: [R, 2] or [R, 3].
        writes: [R, C].
    """

    mix: Tensor
    writes: Tensor


def init_state(
    dimensions: Dimensions,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    memory: str,
    mini_batch_size: int,
    expansion: int,
) -> TitansState:
    """Build a memory that has not read anything: a matrix of zeros, or a network with fixed weights."""
    sequences, heads, key_dim, value_dim, _ = dimensions
    if memory == "matrix":
        start = torch.zeros(heads, key_dim, value_dim, dtype=dtype, device=device)
    else:
        hidden = expansion * key_dim
        first = fixed_weights(heads, key_dim, hidden, dtype, device)
        second = fixed_weights(heads, hidden, value_dim, dtype, device)
        start = torch.cat([first, second.mT], dim=1)
    start = start.expand(sequences, -1, -1, -1).contiguous()
    anchor = start if mini_batch_size > 1 else start[:, :, :0]
    position = torch.zeros(sequences, dtype=torch.int64, device=device)
    return TitansState(start, torch.zeros_like(start), anchor, position)


def step(
    state: TitansState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    momentum: Tensor,
    g: Tensor,
    memory: str,
    mini_batch_size: int,
    expansion: int,
) -> tuple[Tensor, TitansState]:
    """Advance a memory by one token.

        S <- momentum S - lr dl/dM at A;   M <- exp(g) M + S;   o = f(q; M);   A <- M at the end of a mini-batch

    Args:
        state: memory before the token (A its anchor).
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        lr: step size, [B, H], 0 to 1.
        momentum: share of the last step that is taken again, [B, H], 0 to 1.
        g: natural-log decay of the memory, [B, H], at most 0.
        memory: "matrix" or "mlp".
        mini_batch_size: tokens whose gradients are taken at the same memory.
        expansion: hidden width of the network over K.

    Returns:
        Output [B, H, V] and the new state.

    Source:
        arXiv:2501.00663, section 3.1.
    """
    point = state.anchor if mini_batch_size > 1 else state.memory
    if memory == "matrix":
        residual_bhv = 2 * (torch.einsum("bhkv,bhk->bhv", point, k) - v)
        gradient = torch.einsum("bhk,bhv->bhkv", k, residual_bhv)
    else:
        first, second = point.split([k.shape[-1], v.shape[-1]], dim=2)
        before_bhe = torch.einsum("bhke,bhk->bhe", first, k)
        hidden_bhe = F.gelu(before_bhe)
        residual_bhv = 2 * (torch.einsum("bhve,bhe->bhv", second, hidden_bhe) - v)
        back_bhe = torch.einsum("bhve,bhv->bhe", second, residual_bhv) * _gelu_slope(before_bhe)
        gradient = torch.cat(
            [torch.einsum("bhk,bhe->bhke", k, back_bhe), torch.einsum("bhv,bhe->bhve", residual_bhv, hidden_bhe)], dim=2
        )
    running = momentum[..., None, None] * state.momentum - lr[..., None, None] * gradient
    new = g.exp()[..., None, None] * state.memory + running
    position = state.position + 1
    anchor = state.anchor
    if mini_batch_size > 1:
        anchor = torch.where((position == mini_batch_size)[:, None, None, None], new, anchor)
    if memory == "matrix":
        output = torch.einsum("bhkv,bhk->bhv", new, q)
    else:
        first, second = new.split([k.shape[-1], v.shape[-1]], dim=2)
        output = torch.einsum("bhve,bhe->bhv", second, F.gelu(torch.einsum("bhke,bhk->bhe", first, q)))
    return output, TitansState(new, running, anchor, position % mini_batch_size)


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: TitansState,
    *,
    lr: Tensor,
    momentum: Tensor,
    g: Tensor,
    memory: str,
    mini_batch_size: int,
    expansion: int,
    chunk_size: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, TitansState]:
    """Compute the rule in chunks: of `chunk_size` for a matrix, of a mini-batch for a network.

    A network whose mini-batches are single tokens has nothing that could be computed together; they go one by one.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: memory before the first token.
        lr: step sizes, [B, T, H].
        momentum: momentum, [B, T, H].
        g: natural-log decay, [B, T, H].
        memory: "matrix" or "mlp".
        mini_batch_size: tokens whose gradients are taken at the same memory.
        expansion: hidden width of the network over K.
        chunk_size: tokens per chunk, a divisor of T.
        mask: False at the end of rows where a token does not count, [B, T]; None = all count.

    Returns:
        Output [B, T, H, V] and the state after the last token.
    """
    if memory == "mlp" and mini_batch_size == 1:
        return _one_by_one((q, k, v, lr, momentum, g), state, mask, expansion)
    size = chunk_size if memory == "matrix" else mini_batch_size
    tokens = q.shape[1]
    missing = -tokens % size
    if mask is None:
        mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    if missing:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
        lr, g = (F.pad(x, (0, 0, 0, missing)) for x in (lr, g))
        momentum = F.pad(momentum, (0, 0, 0, missing), value=1.0)
        mask = F.pad(mask, (0, missing))
    lengths = mask.sum(dim=1)
    q, k, v, lr, momentum, g, counts = (to_chunks(x, size) for x in (q, k, v, lr, momentum, g, mask[..., None]))
    memories, momenta = _unroll(lr, momentum, g, counts, components=2 if mini_batch_size == 1 else 3)
    form = _matrix if memory == "matrix" else _network
    output, new = form(q, k, v, state, memories, momenta, lengths, mini_batch_size)
    return from_chunks(output)[:, :tokens], new._replace(position=(state.position + lengths) % mini_batch_size)


def _one_by_one(
    inputs: tuple[Tensor, ...], state: TitansState, mask: Tensor | None, expansion: int
) -> tuple[Tensor, TitansState]:
    """Fold `step` over the tokens of a network memory; a token that does not count leaves its row as it was."""
    outputs = []
    counts = [None] * inputs[0].shape[1] if mask is None else mask.unbind(1)
    for count, q, k, v, lr, momentum, g in zip(counts, *(x.unbind(1) for x in inputs), strict=True):
        output, new = step(
            state, q, k, v, lr=lr, momentum=momentum, g=g, memory="mlp", mini_batch_size=1, expansion=expansion
        )
        state = new if count is None else combine(partial(_where, count), new, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Take the new values in some rows [B] and the old ones in the others."""
    return torch.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _unroll(lr: Tensor, momentum: Tensor, g: Tensor, counts: Tensor, components: int) -> tuple[_Shares, _Shares]:
    """Unroll the two recurrences over the tokens of every chunk.

    Args:
        lr: step sizes, [B, H, N, C]; 0 where a token does not count.
        momentum: momentum, [B, H, N, C]; 1 where a token does not count.
        g: log decay, [B, H, N, C]; 0 where a token does not count.
        counts: whether a token counts, [B, 1, N, C].
        components: 2 for a mixture of memory and momentum, 3 with the anchor.

    Returns:
        The memory after every token, R = C, and the momentum after the last, R = 1.
    """
    log_kept = g.cumsum(dim=-1)
    # A token that does not count adds no momentum to the memory.
    kept = pairwise_decay(log_kept) * counts[..., None, :]
    later = torch.ones(kept.shape[-2:], dtype=torch.bool, device=g.device).tril(-1)
    # A product, not the exponential of a sum of logarithms: momentum may be 0.
    running = torch.where(later, momentum[..., :, None], 1.0).cumprod(dim=-2).tril()
    steps, fading = running * lr[..., None, :], momentum.cumprod(dim=-1)
    mix = torch.stack([log_kept.exp(), (kept @ fading[..., None])[..., 0]], dim=-1)
    last_fading = F.pad(fading[..., -1:, None], (1, components - 2))
    return _Shares(F.pad(mix, (0, components - 2)), kept @ steps), _Shares(last_fading, steps[..., -1:, :])


def _after(memories: _Shares, tokens: Tensor) -> _Shares:
    """Return what the memory after some number of a chunk's tokens is made of.

    Args:
        memories: the memory after 1 ... C tokens.
        tokens: numbers of tokens, [B, 1, N, R]; below 0 for the anchor.

    Returns:
        The shares, [B, H, N, R, ...].
    """
    mix, writes = _with_start(memories)
    row = tokens.clamp(min=0)[..., None].expand(*mix.shape[:3], tokens.shape[-1], 1)
    anchor = F.one_hot(torch.tensor(2, device=mix.device), 3).to(mix.dtype)
    return _Shares(
        torch.where(tokens[..., None] < 0, anchor, mix.gather(-2, row.expand(*row.shape[:-1], mix.shape[-1]))),
        writes.gather(-2, row.expand(*row.shape[:-1], writes.shape[-1])),
    )


def _with_start(memories: _Shares) -> _Shares:
    """Put the memory before the chunk in front of those after 1 ... C tokens."""
    mix = F.pad(memories.mix, (0, 0, 1, 0))
    start = F.one_hot(torch.tensor(0, device=mix.device), mix.shape[-1]).to(mix.dtype)
    mix = torch.cat([start.expand_as(mix[..., :1, :]), memories.mix], dim=-2)
    return _Shares(mix, F.pad(memories.writes, (0, 0, 1, 0)))


def _anchor_after(memories: _Shares, position: Tensor, lengths: Tensor, size: int) -> _Shares:
    """Return what the anchor after every chunk is made of, R = 1.

    Args:
        memories: the memory after every token.
        position: tokens of the running mini-batch before the first chunk, [B].
        lengths: tokens that count, [B].
        size: tokens of a mini-batch.
    """
    chunk = memories.writes.shape[-1]
    begins = torch.arange(memories.mix.shape[2], device=position.device)[:, None] * chunk
    read = torch.minimum(lengths[:, None, None, None], begins + chunk)
    return _after(memories, read - begins - (position[:, None, None, None] + read) % size)


def _matrix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: TitansState,
    memories: _Shares,
    momenta: _Shares,
    lengths: Tensor,
    mini_batch_size: int,
) -> tuple[Tensor, TitansState]:
    """Compute a matrix memory; the parts of its state are the memory, the momentum and the anchor."""
    if mini_batch_size == 1:
        start = _with_start(memories)
        seen = _Shares(start.mix[..., :-1, :], start.writes[..., :-1, :])
        ends = [_last(memories), momenta]
        parts = [state.memory, state.momentum]
    else:
        chunks, chunk_size = k.shape[2:4]
        local = torch.arange(chunk_size, device=k.device)
        token = torch.arange(chunks, device=k.device)[:, None] * chunk_size + local
        seen = _after(memories, local - (state.position[:, None, None, None] + token) % mini_batch_size)
        ends = [_last(memories), momenta, _anchor_after(memories, state.position, lengths, mini_batch_size)]
        parts = [state.memory, state.momentum, state.anchor]
    end = _Shares(*(torch.cat(shares, dim=-2) for shares in zip(*ends, strict=True)))
    output, after = momentum_delta.chunkwise(q, k, v, torch.cat(parts, dim=2), seen=seen, read=memories, end=end)
    parts = list(after.split(k.shape[-1], dim=2))
    return output, state._replace(memory=parts[0], momentum=parts[1], anchor=(*parts, state.anchor)[2])


def _last(memories: _Shares) -> _Shares:
    """Return the memory after the last token, R = 1."""
    return _Shares(memories.mix[..., -1:, :], memories.writes[..., -1:, :])


def _network(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: TitansState,
    memories: _Shares,
    momenta: _Shares,
    lengths: Tensor,
    mini_batch_size: int,
) -> tuple[Tensor, TitansState]:
    """Compute a network memory, one mini-batch of tokens after another.

    Where the call starts inside a mini-batch, every block holds the end of one and the start of the next; the gradients
    of the second part are taken at the memory in between.
    """
    wanted = [memories, _last(memories), momenta, _anchor_after(memories, state.position, lengths, mini_batch_size)]
    parts = [state.memory, state.momentum, state.anchor]
    ragged = bool(state.position.any())
    first = torch.ones((), dtype=torch.bool, device=k.device)
    if ragged:
        left = (mini_batch_size - state.position)[:, None, None, None]  # tokens until the mini-batch is over
        wanted.append(_after(memories, left.expand(-1, -1, k.shape[2], -1)))
        first = torch.arange(mini_batch_size, device=k.device)[:, None] < left
    # unbind, not indexing: the backward of an index writes a gradient of the whole tensor for every block.
    inputs = [x.unbind(2) for x in (q, k, v)]
    shares = [[_Shares(*x) for x in zip(*(y.unbind(2) for y in share), strict=True)] for share in wanted]
    outputs = []
    for query, key, value, memory, *rows in zip(*inputs, *shares, strict=True):
        gradient = _gradient(key, value, parts[2])
        if ragged:
            later = _gradient(key, value, _mixed(parts, rows[-1], key, gradient))
            gradient = _Gradient(*(torch.where(first, x, y) for x, y in zip(gradient, later, strict=True)))
        outputs.append(_read(query, parts, memory, key, gradient))
        parts = [_mixed(parts, end, key, gradient) for end in rows[:3]]
    return torch.stack(outputs, dim=2), state._replace(memory=parts[0], momentum=parts[1], anchor=parts[2])


class _Gradient(NamedTuple):
    """Gradient of every token of a block: key^T back for W_1, residual^T hidden for W_2^T.

    Attributes:
        back: [B, H, C, E].
        residual: [B, H, C, V].
        hidden: [B, H, C, E].
    """

    back: Tensor
    residual: Tensor
    hidden: Tensor


def _gradient(k: Tensor, v: Tensor, point: Tensor) -> _Gradient:
    """Differentiate |f(k; M) - v|^2 at the memory `point` for every token: k [B, H, C, K], v [B, H, C, V]."""
    first, second = point.split([k.shape[-1], v.shape[-1]], dim=2)
    before = k @ first
    hidden = F.gelu(before)
    residual = 2 * (hidden @ second.mT - v)
    return _Gradient((residual @ second) * _gelu_slope(before), residual, hidden)


def _mixed(parts: list[Tensor], share: _Shares, k: Tensor, gradient: _Gradient) -> Tensor:
    """Build the one state that a share [B, H, 1, ...] describes."""
    mix, weights = share
    kept = sum(mix[..., None, c] * part for c, part in enumerate(parts))
    back, residual, hidden = gradient
    return kept - torch.cat([(k * weights.mT).mT @ back, (residual * weights.mT).mT @ hidden], dim=2)


def _read(q: Tensor, parts: list[Tensor], memory: _Shares, k: Tensor, gradient: _Gradient) -> Tensor:
    """Apply the network of every token's own memory to its query, without building those memories.

    hidden = gelu(memory_0 Q W_1 + memory_1 Q S_1 - (Q K^T * writes) back), and the same for the second layer
    """
    mix, writes = memory
    back, residual, hidden = gradient

    def layer(x: Tensor, weights: list[Tensor], left: Tensor, right: Tensor) -> Tensor:
        kept = mix[..., :1] * (x @ weights[0]) + mix[..., 1:2] * (x @ weights[1])
        return kept - ((x @ left.mT) * writes) @ right

    widths = [k.shape[-1], residual.shape[-1]]
    first, second = zip(*(part.split(widths, dim=2) for part in parts[:2]), strict=True)
    inner = F.gelu(layer(q, list(first), k, back))
    return layer(inner, [x.mT for x in second], hidden, residual)


def _gelu_slope(x: Tensor) -> Tensor:
    """Differentiate the (exact) GELU."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


RULE = UpdateRule(
    name="titans",
    equation="S ← momentum·S − lr·∇|f(k; M) − v|²;  M ← exp(g)M + S;  o = f(q; M)",
    source=Source("Titans: Learning to Memorize at Test Time", "2501.00663", "section 3.1"),
    gates=(
        GateSpec("lr", "head", "unit", identity=0.0, meaning="step size of the gradient descent", scale=0.1),
        GateSpec("momentum", "head", "unit", identity=1.0, meaning="share of the last step that is taken again"),
        GateSpec("g", "head", "log_decay", identity=0.0, meaning="log decay of the memory"),
    ),
    hyper_parameters=(
        HyperParameter("memory", "matrix", "a matrix, or a network of two layers", choices=("matrix", "mlp")),
        HyperParameter("mini_batch_size", 1, "tokens whose gradients are taken at the same memory", minimum=1),
        HyperParameter("expansion", 4, "hidden width of the network over K; without effect on a matrix", minimum=1),
    ),
    init_state=init_state,
    step=step,
    state_size="2*K*V",
    recurrent_flops="11*K*V",
    chunkwise_flops="12*K*V + 4*C*(2*K + V) + 2*C*C",
    chunkwise_form=chunkwise,
    unit_keys=True,
    counts_tokens=True,
    linear_tensors=(0, 1, 2),
    linear_settings={"memory": "matrix"},
)
