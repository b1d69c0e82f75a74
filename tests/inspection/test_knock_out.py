"""The causal check: what is knocked out is read by nobody, and everything else stays as it was."""

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from lm2_cases import SEGMENT, lfm2_config, llama_config, lm2, tokens

from mnemon.errors import ShapeError
from mnemon.inspection.knock_out import Part, Tail, bank_parts, knock_out, log_probability
from mnemon.layers.memory_bank import ReadResult
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.state import MemoryCache

FLOWS = ("depth", "layer")
TARGET = 3


def tail_after(model: LM2ForCausalLM, before: int, length: int) -> Tail:
    ids = tokens(1, before + length)
    cache = MemoryCache()
    if before:
        with torch.no_grad():
            model(input_ids=ids[:, :before], past_key_values=cache)
    return Tail(ids[0, before:].numpy(), TARGET, cache.state)


def parts_of(model: LM2ForCausalLM, tail: Tail, most: int = 10**6) -> dict[str, Part]:
    return {part.name: part for part in bank_parts(model, tail, most)[0]}


def plain_log_probability(model: LM2ForCausalLM, tail: Tail, **options) -> float:
    """Compute what the check measures with one plain call."""
    ids = torch.from_numpy(tail.ids)[None]
    cache = MemoryCache(None if tail.state is None else tail.state.branch())
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=cache, **options).logits[0]
    chosen = logits.log_softmax(dim=-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return float(chosen[-tail.num_target :].mean())


@pytest.mark.parametrize("flow", FLOWS)
def test_nothing_knocked_out_is_the_plain_model_and_everything_is_the_model_without_memory(flow: str) -> None:
    model = lm2(llama_config(), flow=flow)
    for tail in (tail_after(model, 0, 2 * SEGMENT + 3), tail_after(model, 2 * SEGMENT, 5)):
        whole, losses = knock_out(model, tail, bank_parts(model, tail, 10**6)[0])
        assert whole == pytest.approx(plain_log_probability(model, tail), abs=1e-9)
        (everything,) = (loss for loss in losses if loss.kind == "all")
        expected = plain_log_probability(model, tail, knock_out_memory=True)
        assert everything.log_probability == pytest.approx(expected, abs=1e-9)
        assert everything.log_probability != pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("flow", FLOWS)
def test_all_slots_knocked_out_one_inside_the_other_are_the_whole_memory(flow: str) -> None:
    model = lm2(llama_config(), flow=flow)
    tail = tail_after(model, SEGMENT, 6)
    parts = parts_of(model, tail)
    slots = [part for part in parts.values() if part.kind == "slot"]
    assert len(slots) == (5 if flow == "depth" else 15)
    together = Part("slot", "all slots", None, None, partial(_nested, slots))
    # The last slot of a bank leaves nothing to read.
    assert log_probability(model, tail, together) == pytest.approx(
        log_probability(model, tail, parts["all banks"]), abs=1e-9
    )


def _nested(parts: list[Part]) -> ExitStack:
    stack = ExitStack()
    for part in sorted(parts, key=lambda part: part.index):  # the one entered last acts first: no number moves
        stack.enter_context(part.removed())
    return stack


@pytest.mark.parametrize(("flow", "top_k"), [("depth", None), ("layer", None), ("layer", 2)])
def test_a_slot_is_masked_out_of_the_softmax_of_the_reads(flow: str, top_k: int | None) -> None:
    model = lm2(llama_config(), flow=flow, read_top_k=top_k)
    tail = tail_after(model, 2 * SEGMENT, 6)
    for name, part in parts_of(model, tail).items():
        if part.kind != "slot":
            continue
        masked = [bank for block, bank in zip(model.memory, model.banks, strict=True)
                  if part.block in (None, int(block))]  # fmt: skip
        for bank in masked:
            bank.read = partial(_read_masked, bank, part.index)
        expected = plain_log_probability(model, tail)
        for bank in masked:
            del bank.read
        assert log_probability(model, tail, part) == pytest.approx(expected, abs=1e-9), name


def _read_masked(bank, slot, x, segment, wants_weights=False, queries=None):
    """Read all slots, with the score of one at minus infinity."""
    scores = bank.read_queries(x) @ segment.keys.transpose(-1, -2) / math.sqrt(bank.head_dim)
    scores[..., slot] = -math.inf
    if bank.read_top_k is not None:
        ranks = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
        scores = scores.masked_fill(ranks >= bank.read_top_k, -math.inf)
    retrieved = (scores.softmax(dim=-1) @ segment.values).transpose(1, 2).flatten(-2)
    gate = bank.output_gate(retrieved).sigmoid()
    return ReadResult(bank.output(gate * retrieved), None, gate)


def test_a_block_is_silent_and_the_others_are_not() -> None:
    model = lm2(llama_config(), flow="layer")
    tail = tail_after(model, SEGMENT, 6)
    parts = parts_of(model, tail)
    for name, bank in zip(model.memory, model.banks, strict=True):
        kept = bank.output.weight.detach().clone()
        with torch.no_grad():
            bank.output.weight.zero_()
        expected = plain_log_probability(model, tail)
        with torch.no_grad():
            bank.output.weight.copy_(kept)
        assert log_probability(model, tail, parts[f"block {name}"]) == pytest.approx(expected, abs=1e-9)


def test_the_only_slot_is_the_whole_memory() -> None:
    model = lm2(lfm2_config(), num_slots=1)
    tail = tail_after(model, SEGMENT, 6)
    parts = parts_of(model, tail)
    assert log_probability(model, tail, parts["slot 0"]) == log_probability(model, tail, parts["all banks"])


def test_the_most_important_part_comes_first_and_few_slots_are_those_read_most() -> None:
    model = lm2(llama_config(), flow="layer")
    tail = tail_after(model, SEGMENT, 6)
    parts, notes = bank_parts(model, tail, 4)
    assert sum(part.kind == "slot" for part in parts) == 4
    assert notes == ["of 15 slots, the 4 that these tokens read most were knocked out"]
    assert bank_parts(model, tail, 15)[1] == []
    _, losses = knock_out(model, tail, parts)
    assert [loss.log_probability for loss in losses] == sorted(loss.log_probability for loss in losses)


def test_the_check_leaves_model_and_state_as_they_were() -> None:
    model = lm2(llama_config())
    tail = tail_after(model, 2 * SEGMENT, 5)
    before = [tensor.clone() for tensor in tail.state.tensors()]
    first = knock_out(model, tail, bank_parts(model, tail, 3)[0])
    assert first == knock_out(model, tail, bank_parts(model, tail, 3)[0])
    assert all(torch.equal(one, two) for one, two in zip(before, tail.state.tensors(), strict=True))
    assert not any("read" in vars(bank) for bank in model.banks)


def test_a_target_needs_a_token_before_it() -> None:
    model = lm2(llama_config())
    tail = tail_after(model, 0, 3)
    with pytest.raises(ShapeError, match="at least one before it, got 3"):
        knock_out(model, tail, [])
    with pytest.raises(ShapeError, match="1 to 2 tokens"):
        knock_out(model, replace(tail, num_target=0, ids=np.array([3, 4, 5])), [])
