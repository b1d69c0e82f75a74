"""Steps that recompute in the backward pass are the plain expressions, in values and in every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnemon.layers.lean_gradients import (
    content_of,
    gated_projection,
    gated_update,
    kept_bank,
    normed_projections,
    stretched_sigmoid,
    written_content,
)

B, H, J, T, D_HEAD = 2, 3, 5, 7, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    loss = sum((output * torch.linspace(0.5, 2, output.numel()).view_as(output)).sum() for output in outputs)
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("shared_queries", [False, True], ids=["queries per row", "one query for all rows"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("floor_value", [-1e30, 0.7], ids=["first tokens", "later tokens"])
def test_written_content_is_the_exponentially_weighted_sum(shared_queries, masked, floor_value):
    queries, keys = random(1 if shared_queries else B, H, J, D_HEAD), random(B, H, T, D_HEAD, seed=1)
    values, slope = random(B, H, T, D_HEAD, seed=2), random(H, seed=3)
    positions = torch.arange(3, 3 + T)[None].expand(B, -1) + torch.tensor([[0], [2]])
    valid = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) > 0.4 if masked else None
    floor = torch.full((B, H, J), floor_value, dtype=torch.float64)
    inputs = [queries, keys, values, slope]

    peak, total, value = written_content(queries, keys, values, slope, positions, valid, floor)
    scores = queries @ keys.transpose(-1, -2) + slope[None, :, None, None] * positions[:, None, None, :]
    kept = torch.ones(B, 1, 1, T, dtype=torch.float64) if valid is None else valid[:, None, None, :].double()
    expected_peak = torch.maximum(floor, scores.masked_fill(kept == 0, -1e30).amax(-1)).detach()
    weights = (scores - expected_peak[..., None]).exp() * kept
    assert torch.equal(peak, expected_peak)
    assert torch.allclose(total, weights.sum(-1), atol=1e-14)
    assert torch.allclose(value, weights @ values, atol=1e-14)
    found, expected = gradients((total, value), inputs), gradients((weights.sum(-1), weights @ values), inputs)
    for name, one, other in zip(("queries", "keys", "values", "slope"), found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12), name


def test_a_gated_projection_is_the_projection_of_the_product():
    gate, x, weight = random(2, 5, 6), random(2, 5, 6, seed=1), random(9, 6, seed=2)
    found, expected = gated_projection(gate, x, weight), F.linear(gate * x, weight)
    assert torch.equal(found, expected)
    inputs = [gate, x, weight]
    for one, other in zip(gradients((found,), inputs), gradients((expected,), inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-13)


def test_normed_projections_are_projections_of_the_norm():
    x, scale, one, other = random(2, 5, 8), random(8, seed=1), random(3, 8, seed=2), random(3, 8, seed=3)
    normed = F.rms_norm(x, (8,), scale, 1e-6)
    found, expected = normed_projections(x, scale, 1e-6, one, other), (F.linear(normed, one), F.linear(normed, other))
    inputs = [x, scale, one, other]
    for a, b in zip((*found, *gradients(found, inputs)), (*expected, *gradients(expected, inputs)), strict=True):
        assert torch.allclose(a, b, atol=1e-13)


def test_normed_projections_in_half_precision_are_those_in_full_precision_rounded():
    drawn = (random(2, 5, 8), random(8, seed=1), random(3, 8, seed=2), random(3, 8, seed=3))
    half = [part.detach().to(torch.bfloat16).requires_grad_() for part in drawn]
    full = [part.detach().double().requires_grad_() for part in half]
    found, expected = (normed_projections(*parts[:2], 1e-6, *parts[2:]) for parts in (half, full))
    for a, b in zip((*found, *gradients(found, half)), (*expected, *gradients(expected, full)), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_normed_projections_in_half_precision_survive_a_residual_stream_whose_projection_would_overflow():
    x, weight = torch.full((1, 4), 6e4, dtype=torch.float16), torch.ones(2, 4, dtype=torch.float16)
    found = normed_projections(x, torch.ones(4, dtype=torch.float16), 1e-6, weight, weight)
    assert all(torch.allclose(part, torch.full_like(part, 4.0)) for part in found)


def test_content_is_the_quotient():
    value, total = random(2, 3, 5, 4), random(2, 3, 5, seed=1).detach().exp().requires_grad_()
    found, expected = content_of(value, total), value / total[..., None]
    assert torch.equal(found, expected)
    assert found.transpose(1, 2).is_contiguous()
    inputs = [value, total]
    for one, other in zip(gradients((found,), inputs), gradients((expected,), inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-13)


def test_a_gated_update_is_the_sum_of_the_gated_parts():
    inputs = [random(2, 5, 6, seed=seed) for seed in range(4)]
    found, expected = gated_update(*inputs), inputs[0] * torch.tanh(inputs[1]) + inputs[2] * inputs[3]
    assert torch.allclose(found, expected, atol=1e-14)
    for one, other in zip(gradients((found,), inputs), gradients((expected,), inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-13)


@pytest.mark.parametrize("stretch", [0.0, 0.2])
def test_a_kept_bank_is_the_gated_bank_and_what_is_added(stretch):
    bank, logits, weight, added = (random(*s, seed=n) for n, s in enumerate([(2, 5, 6), (2, 5, 6), (6, 6), (2, 5, 6)]))
    found, gate = kept_bank(bank, logits, weight, added, stretch, 1e-6)
    normed = bank * torch.rsqrt(bank.square().mean(dim=-1, keepdim=True) + 1e-6)
    expected_gate = stretched_sigmoid(logits + F.linear(normed, weight), stretch)
    assert torch.allclose(gate, expected_gate, atol=1e-14)
    assert ((gate == 0) | (gate == 1)).any() == (stretch > 0)
    expected = expected_gate * bank + added
    assert torch.allclose(found, expected, atol=1e-14)
    inputs = [bank, logits, weight, added]
    for one, other in zip(gradients((found,), inputs), gradients((expected,), inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-13)


def test_all_steps_pass_gradcheck():
    positions, floor = torch.arange(4)[None], torch.zeros(1, 1, 2, dtype=torch.float64)
    parts = (random(1, 1, 2, 3), random(1, 1, 4, 3, seed=1), random(1, 1, 4, 3, seed=2), random(1, seed=3))
    # The peak may move with a score, which exp(floor - peak) outside undoes; a floor above all scores keeps it still.
    high = floor + 20
    assert torch.autograd.gradcheck(lambda *p: written_content(*p, positions, None, high)[1:], parts)
    assert torch.autograd.gradcheck(gated_projection, (random(3, 4), random(3, 4, seed=1), random(2, 4, seed=2)))
    norm = (random(3, 4), random(4, seed=1), random(2, 4, seed=2), random(2, 4, seed=3))
    assert torch.autograd.gradcheck(lambda x, s, a, b: normed_projections(x, s, 1e-6, a, b), norm)


def test_autocast_gives_low_precision_projections_and_exact_written_content():
    drawn = (random(2, 5, 8), random(8, seed=1), random(4, 8, seed=2), random(4, 8, seed=3))
    x, scale, one, other = (part.detach().float().requires_grad_() for part in drawn)
    with torch.autocast("cpu", torch.bfloat16):
        keys, values = normed_projections(x, scale, 1e-6, one, other)
        gated = gated_projection(torch.sigmoid(keys), values, torch.ones(3, 4))
        split = [part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (keys, values)]
        queries, floor = torch.randn(2, 2, 3, 2), torch.full((2, 2, 3), -1e30)
        _, total, value = written_content(queries, *split, torch.ones(2), torch.arange(5)[None], None, floor)
    assert keys.dtype == gated.dtype == torch.bfloat16
    assert total.dtype == value.dtype == torch.float32
    (total.sum() + value.sum() + gated.float().sum()).backward()
    for parameter in (x, scale, one, other):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
