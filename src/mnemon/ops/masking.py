"""Masked tokens as identity inputs: a step that leaves the state exactly as it was."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mnemon.ops.rule import UpdateRule


def masked(
    rule: "UpdateRule", q: Tensor, k: Tensor, v: Tensor, mask: Tensor, gates: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Do what `UpdateRule.masked` says.

    Args:
        rule: the rule.
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        mask: True where a token counts, [B, T].
        gates: keywords of the rule.

    Returns:
        q, k, v and keywords.
    """
    hidden = ~mask[:, :, None, None]
    changed = dict(gates)
    for spec in rule.gates:
        if spec.name in gates:
            place = hidden if gates[spec.name].ndim == 4 else hidden[..., 0]
            changed[spec.name] = gates[spec.name].masked_fill(place, spec.identity)
    if rule.counts_tokens:
        changed["mask"] = mask
    return q, k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0), changed


def valid_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Order each row so that the tokens that count come first, in their order.

    Args:
        mask: True where a token counts, [B, T].

    Returns:
        The order [B, T] (a gather index) and its inverse.
    """
    order = torch.argsort(~mask, dim=1, stable=True)
    return order, torch.argsort(order, dim=1)


def take(values: Tensor, order: Tensor) -> Tensor:
    """Reorder `values` [B, T, ...] along T by `order` [B, T]."""
    index = order.reshape(*order.shape, *(1,) * (values.ndim - 2))
    return torch.take_along_dim(values, index, dim=1)
