"""Random inputs of a rule, drawn from its declaration."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mnemon.ops.declaration import Dimensions, GateSpec
from mnemon.ops.state import state_dtype

if TYPE_CHECKING:
    from mnemon.ops.rule import UpdateRule

_PARAMETER_SPREAD = 0.1  # of the weights of an inner model around their initial value


def gate_shape(gate: GateSpec, dimensions: Dimensions, tokens: int) -> tuple[int, ...]:
    """Return the shape of a gate: [B, T, H], with its channels after it if it has one value per channel."""
    shape = (dimensions.sequences, tokens, dimensions.heads)
    channels = {"key": dimensions.key_dim, "value": dimensions.value_dim, "slot": dimensions.slots}
    return shape if gate.per == "head" else (*shape, channels[gate.per])


def axis_sizes(dimensions: Dimensions) -> dict[str, int]:
    """Return the sizes that the letters of a parameter's axes stand for."""
    return {"H": dimensions.heads, "K": dimensions.key_dim, "V": dimensions.value_dim, "J": dimensions.slots}


def random_inputs(
    rule: "UpdateRule",
    dimensions: Dimensions,
    tokens: int,
    seed: int,
    extreme: bool,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Draw what `UpdateRule.random_inputs` promises.

    Args:
        rule: the rule.
        dimensions: sizes; the sequences are the batch.
        tokens: tokens T.
        seed: seed of the draws.
        extreme: let gates reach both ends of their range.
        dtype: dtype of q, k and v.
        device: where.

    Returns:
        q, k, v, gates and parameters by keyword.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, heads, key_dim, value_dim, _ = dimensions

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (draw(batch, tokens, heads, width) for width in (key_dim, key_dim, value_dim))
    q, k = (F.normalize(x, dim=-1) if rule.unit_keys else x / key_dim**0.5 for x in (q, k))
    drawn = {name: x.to(device, dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    for gate in rule.gates:
        values = gate.sample(gate_shape(gate, dimensions, tokens), generator, extreme=extreme)
        drawn[gate.name] = values.to(device, state_dtype(dtype))
    sizes = axis_sizes(dimensions)
    for parameter in rule.parameters:
        values = parameter.initial + _PARAMETER_SPREAD * draw(*(sizes[axis] for axis in parameter.axes))
        drawn[parameter.name] = values.to(device, state_dtype(dtype))
    return drawn
