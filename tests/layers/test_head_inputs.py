"""Queries, keys and values: the step that keeps little for its gradient against the plain expression."""

import math

import pytest
import torch
from torch.nn import functional as F

from mnemon.layers.head_inputs import head_inputs

PLAIN = {"identity": lambda x: x, "silu": F.silu, "elu_plus_one": lambda x: F.elu(x) + 1}


def plain(x: torch.Tensor, activation: str, norm: str | None, factor: float) -> torch.Tensor:
    y = PLAIN[activation](x)
    if norm is None:
        return factor * y
    length = factor * (1.0 if norm == "l2" else math.sqrt(x.shape[-1]))
    return length * y / torch.sqrt(y.square().sum(dim=-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("activation", sorted(PLAIN))
@pytest.mark.parametrize("norm", [None, "l2", "rms"])
@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_values_and_gradients_are_those_of_the_plain_expression(
    activation: str, norm: str | None, factor: float
) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    ours, theirs = (f(x, activation, norm, factor) for f in (head_inputs, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (one,) = torch.autograd.grad((ours * weight).sum(), x)
    (two,) = torch.autograd.grad((theirs * weight).sum(), x)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda z: head_inputs(z, activation, norm, factor), x)


def test_lengths_are_computed_in_float32_for_bfloat16() -> None:
    x = torch.randn(64, 256).bfloat16()
    y = head_inputs(x, "silu", "l2")
    assert y.dtype == torch.bfloat16
    expected = plain(x.float(), "silu", "l2", 1.0)
    assert (y.float() - expected).abs().max() <= 2**-8 * expected.abs().max()
