"""Gated linear attention: a memory that decays by a data-dependent number per key channel.

    S_t = Diag(exp(g_t)) S_{t-1} + k_t^T v_t;   o_t = q_t S_t

Source: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635, section 4; alpha there
is exp(g) here.
"""

import torch
from torch import Tensor

from mnemon.ops.kernels import fla
from mnemon.ops.rule import FlaForm, GateSpec, Source, UpdateRule
from mnemon.ops.state import empty_matrix
from mnemon.ops.vector_decay import chunkwise


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor) -> tuple[Tensor, Tensor]:
    """Decay the rows of the memory S [B, H, K, V] by exp(g), g [B, H, K], add one token, read."""
    state = torch.addcmul(state * g.exp()[..., None], k[..., :, None], v[..., None, :])
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def _fla(q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
    return fla.call("gla", "chunk_gla", q, k, v, state, cu_seqlens, g=g)


RULE = UpdateRule(
    name="gla",
    equation="S ← Diag(exp(g))S + kᵀv;  o = q S",
    source=Source("Gated Linear Attention Transformers with Hardware-Efficient Training", "2312.06635", "section 4"),
    gates=(GateSpec("g", "key", "log_decay", identity=0.0, meaning="log decay per key channel"),),
    init_state=empty_matrix,
    step=step,
    state_size="K*V",
    recurrent_flops="5*K*V",
    chunkwise_flops="4*K*V + 2*C*(K + V) + 3*K",
    chunkwise_form=chunkwise,
    light_backward=True,
    fla_form=FlaForm(_fla),
    linear_tensors=(0,),
)
