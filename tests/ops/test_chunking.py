"""Decays inside and between chunks, and how large chunks are."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemon.ops import get_rule
from mnemon.ops.blocks import compute_rows
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


@pytest.mark.parametrize(
    ("tokens", "chunk_size", "used"),
    [(45, 32, 16), (33, 32, 16), (64, 32, 32), (70, 64, 16), (100, 64, 64), (1000, 64, 64), (5, 64, 16), (45, 24, 24)],
)
def test_chunks_of_short_rows_are_no_larger_than_they_have_tokens_for(tokens: int, chunk_size: int, used: int) -> None:
    seen = []
    rule = get_rule("linear_attention")

    def watched(*arguments: Any, chunk_size: int, **options: Any) -> Any:
        seen.append(chunk_size)
        return rule.chunkwise_form(*arguments, chunk_size=chunk_size, **options)

    inputs = {name: torch.randn(1, tokens, 1, 4, dtype=torch.float64) for name in ("q", "k", "v")}
    state = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    output, _ = compute_rows(replace(rule, chunkwise_form=watched), inputs, state, None, {}, chunk_size)
    assert set(seen) == {used}
    expected, _ = rule.recurrent(**inputs, state=state)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
