"""Kimi Delta Attention: a memory that decays per key channel, then writes the error of what it recalls.

    S' = Diag(exp(g_t)) S_{t-1};   S_t = S' + k_t^T beta_t (v_t - k_t S');   o_t = q_t S_t

Gated DeltaNet with a decay per key channel. Keys must have norm 1 at most.

Source: Kimi Linear, arXiv:2510.26692, section 3; alpha there is exp(g) here.
"""

import torch
from torch import Tensor

from mnemon.ops.delta import chunkwise
from mnemon.ops.kernels import fla
from mnemon.ops.rule import FlaForm, GateSpec, Source, UpdateRule
from mnemon.ops.state import empty_matrix


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Decay the rows of the memory S [B, H, K, V] by exp(g) [B, H, K], correct it by the share beta [B, H]; read."""
    kept = g.exp()
    error = beta[..., None] * (v - torch.einsum("bhk,bhkv->bhv", k * kept, state))
    state = (state * kept[..., None]).addcmul_(k[..., :, None], error[..., None, :])  # one new tensor, not two
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def _fla(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    return fla.call("kda", "chunk_kda", q, k, v, state, cu_seqlens, g=g, beta=beta)


RULE = UpdateRule(
    name="kda",
    equation="S' = Diag(exp(g))S;  S ← S' + kᵀβ(v − kS');  o = q S",
    source=Source("Kimi Linear", "2510.26692", "section 3"),
    gates=(
        GateSpec("g", "key", "log_decay", identity=0.0, meaning="log decay per key channel"),
        GateSpec("beta", "head", "unit", identity=0.0, meaning="write strength"),
    ),
    init_state=empty_matrix,
    step=step,
    state_size="K*V",
    recurrent_flops="7*K*V",
    chunkwise_flops="6*K*V + 2*C*(3*K + 2*V) + 6*K",
    chunkwise_form=chunkwise,
    fla_form=FlaForm(_fla, max_key_dim=256),
    unit_keys=True,
    chunk_size=32,
    light_backward=True,
    linear_tensors=(0,),
)
