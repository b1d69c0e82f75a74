"""Algebra inside and between chunks, shared by chunkwise forms.

Layout: `[B, H, N, C, ...]`, N chunks of C tokens; a chunk is a matrix, and the batch of matrices is in front of it.
Only decays between 0 and 1 ever occur: every exponent is a difference that is at most 0.
"""

import torch
from torch import Tensor


def to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """Cut [B, T, H, ...] into chunks [B, H, N, C, ...]; T is a multiple of `chunk_size`."""
    return view_chunks(x, chunk_size).contiguous()


def view_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """View [B, T, H, ...] as chunks [B, H, N, C, ...]; T is a multiple of `chunk_size`."""
    batch, tokens, heads = x.shape[:3]
    return x.reshape(batch, tokens // chunk_size, chunk_size, heads, *x.shape[3:]).movedim(3, 1)


def from_chunks(x: Tensor) -> Tensor:
    """View chunks [B, H, N, C, ...] as [B, T, H, ...]."""
    return x.flatten(2, 3).movedim(1, 2)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B, [..., M, N], for A [..., M, L] and B [..., L, N]; written out where A has one or two columns."""
    if a.shape[-1] > 2:
        return a @ b
    x = a[..., :1] * b[..., :1, :]
    return x if a.shape[-1] == 1 else x.addcmul_(a[..., 1:], b[..., 1:, :])


def add_product(x: Tensor, a: Tensor, b: Tensor) -> None:
    """Add A B to X in place.

    Batched matrix products are slow where A has one or two columns, and where X is spread over memory.

    Args:
        x: X, [..., M, N].
        a: A, [..., M, L].
        b: B, [..., L, N].
    """
    columns = a.shape[-1]
    if columns <= 2:
        for n in range(columns):
            x.addcmul_(a[..., n, None], b[..., n, None, :])
    elif x.is_contiguous():
        x.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    else:
        x += a @ b


def earlier_or_same(size: int, device: torch.device) -> Tensor:
    """Return a mask [C, C] that is True where the token of the column is not after that of the row."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def pairwise_decay(b: Tensor) -> Tensor:
    """Return what a write at token j has decayed to at token i: exp(b_i - b_j) for j <= i, else 0.

    b_i - b_j is positive above the diagonal, where its exponential may overflow; it is 0 there before. Not minus
    infinity: exponentials of infinities take several times as long.

    Args:
        b: cumulative log decay within the chunk, the token itself included, [..., C].

    Returns:
        Decay [..., C, C].
    """
    decay = (b[..., :, None] - b[..., None, :]).clamp_(max=0.0).exp_()
    return decay.tril() if decay.requires_grad else decay.tril_()  # the exponential's gradient needs its result


def sum_from_token(x: Tensor) -> Tensor:
    """Sum x [..., C, K] over the token itself and all later ones; a product is faster than sums in reversed order."""
    return earlier_or_same(x.shape[-2], x.device).to(x.dtype).mT @ x


def decay_between(g: Tensor) -> Tensor:
    """Return the decay from one state to a later one: exp(g_j + ... + g_{i-1}) for j <= i, else 0.

    Every sum is taken on its own. Differences of one running sum would lose digits once the sum is large, and between
    chunks it has no bound.

    Args:
        g: log decay from state n to state n + 1, [..., N].

    Returns:
        Decay from state j to state i, [..., N + 1, N + 1].
    """
    count = g.shape[-1] + 1
    steps = torch.nn.functional.pad(g, (1, 0))[..., :, None].expand(*g.shape[:-1], count, count)
    sums = steps.masked_fill(~earlier_or_same(count, g.device).tril(-1), 0.0).cumsum(dim=-2)
    return sums.exp().tril()


def chunk_states(
    added: Tensor, total: Tensor | None, state: Tensor, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute S_{n+1} = total_n * S_n + D_n over chunks; made for gradients written by hand, it has none itself.

    Args:
        added: D, [B, H, N, K, V].
        total: decay of a chunk, [B, H, N, K, 1] or [B, H, N, 1, 1]; None is no decay.
        state: S_0, [B, H, K, V].
        backwards: run from the last chunk to the first, S_n = total_n * S_{n+1} + D_n, from S_N = `state`.

    Returns:
        The state that every chunk meets, S_n or backwards S_{n+1}, [B, H, N, K, V]; and the one after all chunks, S_N
        or backwards S_0, [B, H, K, V].
    """
    met, order = torch.empty_like(added), range(added.shape[2])
    for n in reversed(order) if backwards else order:
        met[:, :, n] = state
        state = added[:, :, n] + state if total is None else torch.addcmul(added[:, :, n], state, total[:, :, n])
    return met, state


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """Invert I + A for strictly lower triangular A [..., C, C]; entries on and above the diagonal are ignored."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
