"""RetNet: a memory that decays at a fixed rate per head.

    S_t = exp(g) S_{t-1} + k_t^T v_t;   o_t = q_t S_t

The rate of head h is 1 - 2^(-5-h) (`log_decay`). It is handed in like any other gate.

Source: Retentive Network, arXiv:2307.08621, section 2.1; gamma there is exp(g) here.
"""

import torch
from torch import Tensor

from mnemon.ops.kernels import fla
from mnemon.ops.rule import FlaForm, GateSpec, Source, UpdateRule
from mnemon.ops.scalar_decay import chunkwise
from mnemon.ops.state import empty_matrix


def log_decay(num_heads: int) -> Tensor:
    """Return the log decays of the paper's heads, log(1 - 2^(-5-h)), float64 [H]."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, dtype=torch.float64)))


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor) -> tuple[Tensor, Tensor]:
    """Decay the memory S [B, H, K, V] by exp(g), g [B, H], add one token, read."""
    state = torch.addcmul(state * g.exp()[..., None, None], k[..., :, None], v[..., None, :])
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def _fla(q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
    return fla.call("simple_gla", "chunk_simple_gla", q, k, v, state, cu_seqlens, g=g)


RULE = UpdateRule(
    name="retnet",
    equation="S ← γS + kᵀv;  o = q S",
    source=Source("Retentive Network", "2307.08621", "section 2.1"),
    gates=(GateSpec("g", "head", "log_decay", identity=0.0, meaning="log γ, fixed per head"),),
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
