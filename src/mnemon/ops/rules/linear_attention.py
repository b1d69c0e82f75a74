"""Linear attention: a memory that only adds.

    S_t = S_{t-1} + k_t^T v_t;   o_t = q_t S_t

Nothing is ever forgotten, and nothing is normalised here: keep the output's size in check with a norm after it.

Source: Transformers are RNNs, arXiv:2006.16236, section 3.4, without feature map and normaliser.
"""

import torch
from torch import Tensor

from mnemon.ops.kernels import fla
from mnemon.ops.rule import FlaForm, Source, UpdateRule
from mnemon.ops.scalar_decay import chunkwise
from mnemon.ops.state import empty_matrix


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Add one token to the memory S [B, H, K, V], then read it."""
    state = torch.addcmul(state, k[..., :, None], v[..., None, :])
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def _fla(q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    # Simple GLA without a decay: the function named after linear attention normalises its output by default.
    return fla.call("simple_gla", "chunk_simple_gla", q, k, v, state, cu_seqlens)


RULE = UpdateRule(
    name="linear_attention",
    equation="S ← S + kᵀv;  o = q S",
    source=Source("Transformers are RNNs", "2006.16236", "section 3.4"),
    gates=(),
    init_state=empty_matrix,
    step=step,
    state_size="K*V",
    recurrent_flops="4*K*V",
    chunkwise_flops="4*K*V + 2*C*(K + V)",
    chunkwise_form=chunkwise,
    fla_form=FlaForm(_fla),
    light_backward=True,
    linear_tensors=(0,),
)
