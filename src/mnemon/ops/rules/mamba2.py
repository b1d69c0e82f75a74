"""Mamba-2 (SSD): a memory that decays by a data-dependent number per head.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t;   o_t = q_t S_t

In the paper's names: k = B, q = C, v = dt x, g = -exp(A_log) dt, with the step dt > 0. Decay and write are tied by dt,
which is the layer's business, as is the skip term D x.

Source: Transformers are SSMs, arXiv:2405.21060, section 6.
"""

import torch
from torch import Tensor

from mnemon.ops.kernels import fla
from mnemon.ops.rule import FlaForm, GateSpec, Source, UpdateRule
from mnemon.ops.scalar_decay import chunkwise
from mnemon.ops.state import empty_matrix


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor) -> tuple[Tensor, Tensor]:
    """Decay the memory S [B, H, K, V] by exp(g), g [B, H], add one token, read."""
    state = torch.addcmul(state * g.exp()[..., None, None], k[..., :, None], v[..., None, :])
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def _fla(q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
    return fla.call("simple_gla", "chunk_simple_gla", q, k, v, state, cu_seqlens, g=g)


RULE = UpdateRule(
    name="mamba2",
    equation="S ← exp(g)S + kᵀv;  o = q S",
    source=Source("Transformers are SSMs", "2405.21060", "section 6"),
    gates=(GateSpec("g", "head", "log_decay", identity=0.0, meaning="log decay, -exp(A_log)·Δ"),),
    init_state=empty_matrix,
    step=step,
    state_size="K*V",
    recurrent_flops="5*K*V",
    chunkwise_flops="4*K*V + 2*C*(K + V)",
    chunkwise_form=chunkwise,
    fla_form=FlaForm(_fla),
    light_backward=True,
    linear_tensors=(0,),
)
