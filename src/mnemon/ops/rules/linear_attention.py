"""Linear attention: a memory that only adds.

    S_t = S_{t-1} + k_t^T v_t;   o_t = q_t S_t

Nothing is ever forgotten, and nothing is normalised here: keep the output's size in check with a norm after it.

Source: Transformers are RNNs, arXiv:2006.16236, equations 16-20, without feature map and normaliser.
"""

import torch
from torch import Tensor

from mnemon.ops.chunking import from_chunks, to_chunks
from mnemon.ops.kernels import fla
from mnemon.ops.rule import FlaForm, Source, UpdateRule
from mnemon.ops.state import empty_matrix


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Add one token to the memory S [B, H, K, V], then read it."""
    state = torch.addcmul(state, k[..., :, None], v[..., None, :])
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def chunkwise(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Compute O = Q S + tril(Q K^T) V and S <- S + K^T V per chunk, all chunks at once."""
    q, k, v = (to_chunks(x, chunk_size) for x in (q, k, v))
    states = torch.cat([state[:, :, None], k.mT @ v], dim=2).cumsum(dim=2)  # at every chunk's start, and at the end
    output = (q @ k.mT).tril() @ v + q @ states[:, :, :-1]
    return from_chunks(output), states[:, :, -1]


def _fla(q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    # Simple GLA without a decay: the function named after linear attention normalises its output by default.
    return fla.call("simple_gla", "chunk_simple_gla", q, k, v, state, cu_seqlens)


RULE = UpdateRule(
    name="linear_attention",
    equation="S ← S + kᵀv;  o = q S",
    source=Source("Transformers are RNNs", "2006.16236", "equations 16-20"),
    gates=(),
    init_state=empty_matrix,
    step=step,
    state_size="K*V",
    recurrent_flops="4*K*V",
    chunkwise_flops="4*K*V + 2*C*(K + V)",
    chunkwise_form=chunkwise,
    fla_form=FlaForm(_fla),
)
