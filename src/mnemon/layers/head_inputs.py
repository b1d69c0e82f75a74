"""Queries, keys and values from what the convolution left: an activation, a length, a factor, in one step.

    y = c f(x)                          without a norm
    y = c n f(x) / sqrt(|f(x)|^2 + e)   per head, n = 1 or sqrt(d)

Autograd would keep every intermediate of this, five times what goes in; here only x is kept.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mnemon.ops.state import state_dtype

Activation = Literal["identity", "silu", "elu_plus_one"]
Norm = Literal["l2", "rms"]

_UNIT_EPS = 1e-6


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


class _Function(NamedTuple):
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


_FUNCTIONS: dict[str, _Function] = {
    "identity": _Function(lambda x: x, torch.ones_like),
    "silu": _Function(F.silu, _silu_slope),
    "elu_plus_one": _Function(lambda x: F.elu(x) + 1, lambda x: x.clamp(max=0.0).exp()),
}


def head_inputs(x: Tensor, activation: Activation, norm: Norm | None = None, factor: float = 1.0) -> Tensor:
    """Return what a rule is given, from what the convolution left.

    Args:
        x: [..., d], one head.
        activation: f.
        norm: "l2" for heads of length c, "rms" for heads of length c sqrt(d), None for any length.
        factor: c.

    Returns:
        y like x; lengths are computed in float32 at least.
    """
    if norm is None and factor == 1.0:
        return _FUNCTIONS[activation].value(x)
    y: Tensor = _HeadInputs.apply(x, activation, norm, factor)
    return y


class _HeadInputs(torch.autograd.Function):
    """`head_inputs` with a gradient that computes the activation again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, norm: str | None, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.choices = activation, norm, factor
        f = _FUNCTIONS[activation].value(x.to(state_dtype(x.dtype)))
        return (f * _scale(f, norm, factor)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        activation, norm, factor = ctx.choices
        wide = x.to(state_dtype(x.dtype))
        function = _FUNCTIONS[activation]
        gradient = gradient.to(wide.dtype)
        if norm is None:
            to_f = gradient * factor
        else:
            f = function.value(wide)
            inverse = _inverse_length(f)
            along = torch.linalg.vecdot(gradient, f)[..., None] * inverse.square()
            to_f = torch.addcmul(gradient, f, along, value=-1.0).mul_(inverse * _length(norm, factor, x))
        if activation != "identity":
            to_f = to_f * function.slope(wide)
        return to_f.to(x.dtype), None, None, None


def _scale(f: Tensor, norm: str | None, factor: float) -> Tensor | float:
    return factor if norm is None else _inverse_length(f) * _length(norm, factor, f)


def _inverse_length(f: Tensor) -> Tensor:
    return torch.rsqrt(torch.linalg.vecdot(f, f) + _UNIT_EPS)[..., None]


def _length(norm: str, factor: float, x: Tensor) -> float:
    return factor * (1.0 if norm == "l2" else math.sqrt(x.shape[-1]))
