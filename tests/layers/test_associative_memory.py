"""The associative memory of a block: features, recall, overwriting, what gradients see."""

import pytest
import torch

from mnemon.layers.associative_memory import Association, AssociativeMemory, dpfp

WIDTH, KEYS, ORDER = 6, 4, 3


def memory(seed: int = 0) -> AssociativeMemory:
    """Return a memory in float64 whose write strength is 1 and whose values are the tokens themselves."""
    torch.manual_seed(seed)
    built = AssociativeMemory(WIDTH, KEYS, ORDER)
    with torch.no_grad():
        for parameter, value in built.initial_values():
            parameter.copy_(value)
        built.value.weight.copy_(torch.eye(WIDTH))
        built.write_strength.weight.zero_()
        built.write_strength.bias.fill_(50.0)
        built.query.weight.copy_(built.key.weight)
    return built.double()


def test_features_are_products_of_neighbouring_rectified_halves():
    x = torch.tensor([1.0, -2.0])
    # r = (1, 0, 0, 2); r * roll(r, 1) = (1*2, 0*1, 0*0, 2*0); r * roll(r, 2) = (1*0, 0*2, 0*1, 2*0)
    assert dpfp(x, 2).tolist() == [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert dpfp(torch.randn(5, KEYS), ORDER).shape == (5, 2 * ORDER * KEYS)
    assert dpfp(torch.randn(50, KEYS), ORDER).min() >= 0


def test_an_empty_memory_answers_exactly_zero():
    built = memory()
    assert not built.read(torch.randn(2, 5, WIDTH, dtype=torch.float64), built.empty(2)).any()


def test_what_was_written_is_recalled_and_written_again_it_is_replaced():
    built = memory()
    token = torch.randn(1, 1, WIDTH, dtype=torch.float64)
    once = built.write(token, built.empty(1))
    assert torch.allclose(built.read(token, once), token, rtol=1e-3)
    # The same key with another value: the projection to keys does not see the change.
    null = torch.linalg.svd(built.key.weight)[2][-1].detach()
    other = token + 3 * null
    twice = built.write(other, once)
    assert torch.allclose(built.read(token, twice), other, rtol=1e-3)
    assert torch.allclose(twice.normaliser, once.normaliser, atol=1e-3)  # the key was known already


def test_a_closed_gate_leaves_the_matrix_exactly_as_it_is_and_a_sigmoid_does_not():
    tokens = torch.randn(1, 2, WIDTH, dtype=torch.float64)
    for stretch, unchanged in ((0.0, False), (0.1, True)):
        built = memory()
        held = built.write(torch.randn(1, 3, WIDTH, dtype=torch.float64), built.empty(1))
        built.gate_stretch = stretch
        with torch.no_grad():
            built.write_strength.bias.fill_(-4.0)
        assert torch.equal(built.write(tokens, held).matrix, held.matrix) is unchanged


def test_tokens_of_one_segment_are_written_against_the_memory_before_it():
    built = memory()
    tokens, held = torch.randn(1, 2, WIDTH, dtype=torch.float64), built.empty(1)
    held = built.write(torch.randn(1, 3, WIDTH, dtype=torch.float64), held)
    together = built.write(tokens, held)
    apart = [built.write(tokens[:, place : place + 1], held) for place in range(2)]
    for whole, before, *parts in zip(together, held, *apart, strict=True):
        assert torch.allclose(whole, before + sum(part - before for part in parts), atol=1e-12)


def test_no_gradient_flows_through_what_is_new():
    built = memory()
    held = Association(*(torch.rand_like(part) for part in built.empty(1)))
    features = torch.randn(1, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    held.normaliser.requires_grad_()
    written = built.write(features, held).normaliser
    (slope,) = torch.autograd.grad(written.sum(), held.normaliser)
    assert torch.equal(slope, torch.ones_like(slope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_is_kept_in_float32_whatever_the_model_or_autocast_computes_in(dtype):
    built = memory().to(dtype)
    tokens = torch.randn(1, 3, WIDTH, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        held = built.write(tokens, built.empty(1))
        read = built.read(tokens, held)
    assert {part.dtype for part in held} == {torch.float32}
    assert read.dtype == dtype
