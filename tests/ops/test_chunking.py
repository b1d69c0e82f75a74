"""Decays inside and between chunks."""

import math

import torch
from torch import Tensor

from mnemon.ops.chunking import decay_between, pairwise_decay


def strong_decay(tokens: int) -> Tensor:
    """Return log decays from none to one whose exponential is 0, and whose negative's is infinite."""
    return -torch.linspace(0.0, 1000.0, tokens, dtype=torch.float64)


def test_pairwise_decay_is_its_definition_where_the_exponential_above_the_diagonal_overflows() -> None:
    b = strong_decay(6).cumsum(-1)
    expected = [[math.exp(b[i] - b[j]) if j <= i else 0.0 for j in range(6)] for i in range(6)]
    torch.testing.assert_close(pairwise_decay(b), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_decay_between_states_is_its_definition_where_the_exponential_above_the_diagonal_overflows() -> None:
    g = strong_decay(5)
    expected = [[math.exp(g[j:i].sum()) if j <= i else 0.0 for j in range(6)] for i in range(6)]
    torch.testing.assert_close(decay_between(g), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def decays_of(g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decays within and between chunks for log decays g."""
    return pairwise_decay(g.cumsum(-1)), decay_between(g)


def test_decays_have_exact_gradients_up_to_no_decay_at_all() -> None:
    g = -torch.rand(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(decays_of, g.requires_grad_())
    none = torch.zeros(5, dtype=torch.float64)
    at_zero, close = (torch.autograd.functional.jacobian(decays_of, x) for x in (none, none - 1e-9))
    torch.testing.assert_close(at_zero, close, rtol=0, atol=1e-7)
