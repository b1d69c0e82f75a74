"""The counted multiply-adds against what torch really multiplies."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mnemon.bench.cost import (
    MemoryShape,
    ModelShape,
    arithmetic_ratio,
    memory_multiply_adds,
    plain_multiply_adds,
    visible_pairs,
)
from mnemon.bench.models import build_model, random_tokens
from mnemon.models.modeling_lm2 import LM2ForCausalLM

SHAPE = ModelShape(32, 48, 2, 4, 2, 64)


def counted(memory: MemoryShape | None, tokens: int) -> int:
    """Multiply-adds of a forward pass as torch counts them, without the decoder's own attention kernel."""
    model = build_model(SHAPE, memory, "cpu", "float32").eval()
    if isinstance(model, LM2ForCausalLM):
        model.segmented.prepare()  # runs a few tokens, once
        for bank in model.banks:
            bank.read_top_k = bank.slot_key.shape[0]  # all slots, by plain products: the fused kernel is not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_tokens(SHAPE, 1, tokens, "cpu"), use_cache=True)
    flops = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    return sum(number for name, number in flops.items() if "scaled_dot_product" not in name) // 2


@pytest.mark.parametrize("tokens", [5, 24, 29])
def test_the_memory_multiplies_exactly_what_the_formula_counts(tokens):
    memory = MemoryShape("odd", 6, 12, segment_length=8, num_heads=3)
    plain, with_memory = counted(None, tokens), counted(memory, tokens)
    assert with_memory - plain == memory_multiply_adds(SHAPE, memory, tokens)


@pytest.mark.parametrize("tokens", [1, 24])
def test_the_plain_model_multiplies_what_the_formula_counts_and_its_attention(tokens):
    attention = SHAPE.num_layers * 2 * SHAPE.hidden_size * visible_pairs(tokens)
    assert counted(None, tokens) == plain_multiply_adds(SHAPE, tokens) - attention


@pytest.mark.parametrize(("tokens", "span"), [(1, None), (7, None), (7, 1), (7, 3), (7, 7), (7, 90)])
def test_visible_pairs_are_those_of_the_mask(tokens, span):
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    seen = (distance >= 0) & (distance < (span or tokens))
    assert visible_pairs(tokens, span) == int(seen.sum())


def test_the_ratio_follows_the_formula_of_whole_segments():
    shape, memory = ModelShape(), MemoryShape("full", 256, 256, 256)
    width, slots, slot_width, length = 256, 256, 256, 256
    added = 4 * width * slot_width + slot_width**2 + 4 * slots * slot_width + 6 * slots * slot_width**2 / length
    plain = plain_multiply_adds(shape, 1024)
    assert arithmetic_ratio(shape, memory, 1024) == pytest.approx((plain + 8 * 1024 * added) / plain)
