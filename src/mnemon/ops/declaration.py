"""The vocabulary in which a rule declares itself: gates, weights, settings, sizes, source.

Shapes: `B` batch, `T` tokens, `H` heads, `K` key width per head, `V` value width per head, `J` slots.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = Any
"""A tensor, or a NamedTuple of tensors; the first dimension of each is the sequence."""

Axis: TypeAlias = Literal["head", "key", "value", "slot"]
Range: TypeAlias = Literal["log_decay", "unit", "positive", "real"]

LIMITS: Mapping[Range, tuple[float, float]] = {
    "log_decay": (float("-inf"), 0.0),
    "unit": (0.0, 1.0),
    "positive": (0.0, float("inf")),
    "real": (float("-inf"), float("inf")),
}
"""Smallest and largest value of each kind of gate, both included."""


@dataclass(frozen=True)
class Source:
    """Where a rule comes from.

    Attributes:
        title: title of the paper.
        arxiv: arXiv identifier, such as "2412.06464".
        equation: number of the equation, section or table.
    """

    title: str
    arxiv: str
    equation: str


@dataclass(frozen=True)
class GateSpec:
    """One gate of a rule: a value per token that the rule takes by keyword, already in its final range.

    Attributes:
        name: keyword of the gate.
        per: "head" [B, T, H]; "key" [B, T, H, K]; "value" [B, T, H, V]; "slot" [B, T, H, J].
        kind: "log_decay" (natural logarithm of a decay, at most 0), "unit" (0 to 1), "positive" (0 or more), "real".
        identity: value at which, with zero keys and values, a step leaves the state exactly as it was.
        meaning: what the gate does, in a few words.
        scale: factor on what `sample` draws, for gates whose useful values are small.
    """

    name: str
    per: Axis
    kind: Range
    identity: float
    meaning: str
    scale: float = 1.0

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, *, extreme: bool = False) -> Tensor:
        """Draw values of a gate.

        Args:
            shape: shape of the result.
            generator: source of randomness.
            extreme: mix both ends of the range (a log decay of 0 and of -20) with ordinary values.

        Returns:
            Values in the range of the gate, float64.
        """
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.kind == "log_decay":
            values, ends = -torch.nn.functional.softplus(noise - 2.0), (0.0, -20.0)
        elif self.kind == "unit":
            values, ends = noise.sigmoid(), (0.0, 1.0)
        elif self.kind == "positive":
            values, ends = noise.exp(), (0.0, 1.0)
        else:
            values, ends = noise, (0.0, 1.0)
        if extreme:
            pick = torch.randint(0, 3, shape, generator=generator)
            values = torch.where(pick == 0, ends[0], torch.where(pick == 1, ends[1], values))
        return values * self.scale


@dataclass(frozen=True)
class ParameterSpec:
    """A weight of the memory itself that a rule takes by keyword (such as the norm of an inner model).

    Attributes:
        name: keyword of the weight.
        axes: letters of its shape, such as ("H", "V").
        meaning: what it is, in a few words.
        initial: value a layer starts it at.
    """

    name: str
    axes: tuple[str, ...]
    meaning: str
    initial: float


@dataclass(frozen=True)
class HyperParameter:
    """A setting of a rule that changes its mathematics (unlike `chunk_size`, which never changes an answer).

    Attributes:
        name: keyword of the setting.
        default: value when it is not given.
        meaning: what it does, in a few words.
        minimum: smallest value of a number, or None.
        choices: the values it may have, or None.
    """

    name: str
    default: int | float | str
    meaning: str
    minimum: float | None = None
    choices: tuple[str, ...] | None = None


class Dimensions(NamedTuple):
    """Sizes of one call: sequences, heads, key and value width, and slots where a gate has them (else 0)."""

    sequences: int
    heads: int
    key_dim: int
    value_dim: int
    slots: int = 0


@dataclass(frozen=True)
class FlaForm:
    """How flash-linear-attention computes a rule.

    Attributes:
        call: (q, k, v, state, cu_seqlens, **gates) -> (o, state), through `mnemon.ops.kernels.fla.call`.
        max_key_dim: widest key its kernels take, or None.
    """

    call: Callable[..., tuple[Tensor, State]]
    max_key_dim: int | None = None
