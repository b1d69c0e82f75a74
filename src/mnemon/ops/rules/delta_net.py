"""DeltaNet: a memory that writes the error of what it recalls.

    S_t = S_{t-1} + k_t^T beta_t (v_t - k_t S_{t-1});   o_t = q_t S_t

One step of gradient descent on 1/2 |k S - v|^2 with step size beta. Keys must have norm 1 at most; with beta in (0, 1)
what stood under a key then moves towards the new value.

Source: Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484, section 2.2.
"""

import torch
from torch import Tensor

from mnemon.ops.delta import chunkwise
from mnemon.ops.kernels import fla
from mnemon.ops.rule import FlaForm, GateSpec, Source, UpdateRule
from mnemon.ops.state import empty_matrix


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Correct what the memory S [B, H, K, V] recalls for a key by the share beta [B, H] of its error, then read."""
    error = beta[..., None] * (v - torch.einsum("bhk,bhkv->bhv", k, state))
    state = torch.addcmul(state, k[..., :, None], error[..., None, :])
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def _fla(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None, beta: Tensor
) -> tuple[Tensor, Tensor]:
    return fla.call("delta_rule", "chunk_delta_rule", q, k, v, state, cu_seqlens, beta=beta)


RULE = UpdateRule(
    name="delta_net",
    equation="S ← S + kᵀβ(v − kS);  o = q S",
    source=Source(
        "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", "2406.06484", "section 2.2"
    ),
    gates=(GateSpec("beta", "head", "unit", identity=0.0, meaning="write strength"),),
    init_state=empty_matrix,
    step=step,
    state_size="K*V",
    recurrent_flops="6*K*V",
    chunkwise_flops="6*K*V + 2*C*(3*K + 2*V)",
    chunkwise_form=chunkwise,
    fla_form=FlaForm(_fla, max_key_dim=256),
    unit_keys=True,
    chunk_size=32,
    light_backward=True,
    linear_tensors=(0,),
)
