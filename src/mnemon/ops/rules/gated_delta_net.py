"""Gated DeltaNet: a memory that decays per head, then writes the error of what it recalls.

    S' = exp(g_t) S_{t-1};   S_t = S' + k_t^T beta_t (v_t - k_t S');   o_t = q_t S_t

The error is taken on the decayed memory. Keys must have norm 1 at most.

Source: Gated Delta Networks, arXiv:2412.06464, section 3; alpha there is exp(g) here.
"""

import torch
from torch import Tensor

from mnemon.ops.delta import chunkwise
from mnemon.ops.kernels import fla
from mnemon.ops.rule import FlaForm, GateSpec, Source, UpdateRule
from mnemon.ops.state import empty_matrix


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Decay the memory S [B, H, K, V] by exp(g) and correct it by the share beta of its error, both [B, H]; read."""
    kept = g.exp()[..., None]
    error = beta[..., None] * (v - kept * torch.einsum("bhk,bhkv->bhv", k, state))
    state = (state * kept[..., None]).addcmul_(k[..., :, None], error[..., None, :])  # one new tensor, not two
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def _fla(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    return fla.call("gated_delta_rule", "chunk_gated_delta_rule", q, k, v, state, cu_seqlens, g=g, beta=beta)


RULE = UpdateRule(
    name="gated_delta_net",
    equation="S' = exp(g)S;  S ← S' + kᵀβ(v − kS');  o = q S",
    source=Source("Gated Delta Networks", "2412.06464", "section 3"),
    gates=(
        GateSpec("g", "head", "log_decay", identity=0.0, meaning="log decay"),
        GateSpec("beta", "head", "unit", identity=0.0, meaning="write strength"),
    ),
    init_state=empty_matrix,
    step=step,
    state_size="K*V",
    recurrent_flops="7*K*V",
    chunkwise_flops="6*K*V + 2*C*(3*K + 2*V)",
    chunkwise_form=chunkwise,
    fla_form=FlaForm(_fla, max_key_dim=256),
    unit_keys=True,
    chunk_size=32,
    light_backward=True,
    linear_tensors=(0,),
)
