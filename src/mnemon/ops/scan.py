"""The recurrent form of any rule: its `step`, folded over the tokens.

This is the reference every faster form is tested against, and what decoding runs, so it shares no code with them.
"""

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemon.ops.state import combine, concatenate, state_dtype

if TYPE_CHECKING:
    from mnemon.ops.rule import UpdateRule
    from mnemon.ops.validation import Call


def scan(rule: "UpdateRule", call: "Call") -> tuple[Tensor, Any]:
    """Run a checked call token by token.

    Args:
        rule: the rule.
        call: the call; packed sequences run one after the other, each from its own row of the state.

    Returns:
        Output [B, T, H, V] in the dtype of v, and the state after the last token of each sequence.
    """
    dtype = state_dtype(call.v.dtype)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    if call.cu_seqlens is None:
        output, state = _fold(rule, call.state, q, k, v, call.gates, call.options, call.mask)
        return output.to(call.v.dtype), state
    outputs, states = [], []
    bounds = call.cu_seqlens.tolist()
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        span = slice(start, stop)
        gates = {name: gate[:, span] for name, gate in call.gates.items()}
        state = combine(lambda tensor, row=row: tensor[row : row + 1], call.state)
        output, state = _fold(rule, state, q[:, span], k[:, span], v[:, span], gates, call.options, None)
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1).to(call.v.dtype), concatenate(states)


def _fold(
    rule: "UpdateRule",
    state: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    options: dict[str, Any],
    mask: Tensor | None,
) -> tuple[Tensor, Any]:
    tokens = zip(*(x.unbind(1) for x in (q, k, v, *gates.values())), strict=True)
    counts = [None] * q.shape[1] if mask is None else mask.unbind(1)
    outputs = []
    for (q_bhk, k_bhk, v_bhv, *values), count in zip(tokens, counts, strict=True):
        output, new = rule.step(state, q_bhk, k_bhk, v_bhv, **dict(zip(gates, values, strict=True)), **options)
        state = new if count is None else _keep(state, new, count)
        outputs.append(output)
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), state


def _keep(old: Any, new: Any, count: Tensor) -> Any:
    """Take the new state in rows whose token counts, and the old state exactly elsewhere."""
    return combine(lambda a, b: torch.where(count.reshape(-1, *(1,) * (a.ndim - 1)), b, a), old, new)
