"""Lightning Attention: a memory that decays at a fixed rate per head and layer.

    S_t = exp(g) S_{t-1} + k_t^T v_t;   o_t = q_t S_t

The rates are linear in the head, and deeper layers forget less (`log_decay`). It is handed in like any other gate.

Source: Lightning Attention-2, arXiv:2401.04658, section 3; lambda there is exp(g) here.
"""

import torch
from torch import Tensor

from mnemon.ops.kernels import fla
from mnemon.ops.rule import FlaForm, GateSpec, Source, UpdateRule
from mnemon.ops.scalar_decay import chunkwise
from mnemon.ops.state import empty_matrix


def log_decay(num_heads: int, layer_index: int, num_layers: int) -> Tensor:
    """Return the log decays of a layer's heads, -(8 / H) (1 - layer_index / num_layers) h, float64 [H].

    Head 0 never forgets. Published models with ALiBi slopes use other rates.
    """
    depth = 1 - layer_index / num_layers
    return -8.0 / num_heads * depth * torch.arange(num_heads, dtype=torch.float64)


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor) -> tuple[Tensor, Tensor]:
    """Decay the memory S [B, H, K, V] by exp(g), g [B, H], add one token, read."""
    state = torch.addcmul(state * g.exp()[..., None, None], k[..., :, None], v[..., None, :])
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def _fla(q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
    return fla.call("simple_gla", "chunk_simple_gla", q, k, v, state, cu_seqlens, g=g)


RULE = UpdateRule(
    name="lightning",
    equation="S ← γS + kᵀv;  o = q S",
    source=Source("Lightning Attention-2", "2401.04658", "section 3"),
    gates=(GateSpec("g", "head", "log_decay", identity=0.0, meaning="log γ, fixed per head and layer"),),
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
