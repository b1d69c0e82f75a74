"""Recording RMT and ARMT: against states and attention computed by hand, without changing a bit."""

import itertools

import numpy as np
import pytest
import torch
from families import family
from lm2_cases import SEGMENT, lfm2_config, llama_config, tokens
from rmt_cases import CASES, MEMORY_TOKENS, case, memory_of, rmt
from torch import Tensor

from mnemon.inspection.reading import Reading, plan_reading, read_segments
from mnemon.inspection.record_token_memory import TokenMemoryRecorder, token_memory_parts
from mnemon.inspection.trace import TokenMemory, group_columns
from mnemon.models.modeling_rmt import RMTForCausalLM
from mnemon.models.state import MemoryCache, MemoryState

LENGTH = 3 * SEGMENT + 4
TOKENS = [name for name in CASES if name.startswith("rmt")]
every_case = pytest.mark.parametrize("name", CASES)
every_token_case = pytest.mark.parametrize("name", TOKENS)


def record(
    model: RMTForCausalLM, reading: Reading, state: MemoryState | None = None
) -> tuple[TokenMemory, Tensor, TokenMemoryRecorder]:
    recorder = TokenMemoryRecorder(model, None, reading, state)
    logits = [logits for _, logits, _ in read_segments(model, reading, [recorder], state)]
    return recorder.memory(), torch.cat(logits), recorder


def state_after(model: RMTForCausalLM, ids: Tensor, state: MemoryState | None = None) -> MemoryState:
    with torch.no_grad():
        return model(ids, past_key_values=MemoryCache(state)).past_key_values.state


def entries(model: RMTForCausalLM, state: MemoryState) -> Tensor:
    if model.config.is_associative:
        return torch.stack([held.matrix[0].flatten() for held in state.associations])
    return memory_of(state)[0][0]


@every_case
def test_norms_and_changes_are_those_of_the_states_after_every_segment(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    memory, _, recorder = record(model, plan_reading(model, ids[0].tolist(), 1000, None))
    before = entries(model, model.initial_state(1))
    assert memory.norm.shape == (4, len(before))
    assert len(memory.units) == len(before)
    for segment in range(4):
        after = entries(model, state_after(model, ids[:, : SEGMENT * (segment + 1)]))
        np.testing.assert_allclose(memory.norm[segment], after.norm(dim=1).detach(), rtol=1e-5)
        change = (after - before).norm(dim=1) / after.norm(dim=1)
        np.testing.assert_allclose(memory.change[segment], change.detach(), rtol=1e-4, atol=1e-6)
        before = after
    assert not memory.change[3].any()  # incomplete: nothing was written
    assert memory.change[0].all()
    if model.config.is_associative:
        assert memory.units[1] == "memory of block 1"
        assert memory.read.shape == (LENGTH, 0)
        assert any("no shares of reads" in note for note in recorder.notes)
    else:
        assert memory.units == ("memory token 0", "memory token 1", "memory token 2")
        assert recorder.notes == []


@torch.no_grad()
def attention_by_hand(model: RMTForCausalLM, ids: Tensor) -> np.ndarray:
    """Return the shares [T, m] with plain calls of the decoder on every segment's frame."""
    memory, rows = model.memory_tokens.weight[None], []
    count = memory.shape[1]
    before = model.base.config._attn_implementation
    model.base.set_attn_implementation("eager")
    try:
        for segment in ids.split(SEGMENT, dim=1):
            frame = torch.cat([memory, model.get_input_embeddings()(segment), memory], dim=1)
            output = model.base(inputs_embeds=frame, output_hidden_states=True, output_attentions=True, use_cache=False)
            weights = torch.stack([x for x in output.attentions if x is not None]).double().mean(dim=(0, 2))[0]
            rows.append(weights[count : count + segment.shape[1], :count])
            memory = output.hidden_states[-1][:, -count:]
    finally:
        model.base.set_attn_implementation(before)
    return torch.cat(rows).numpy()


@every_token_case
def test_reads_are_the_shares_of_attention_on_the_memory_tokens(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    memory, _, _ = record(model, plan_reading(model, ids[0].tolist(), 1000, None))
    assert memory.read.shape == (LENGTH, MEMORY_TOKENS)
    np.testing.assert_allclose(memory.read, attention_by_hand(model, ids), atol=1e-5)
    assert (memory.read.sum(axis=1) <= 1 + 1e-6).all()
    assert memory.read.min() > 0


@every_token_case
def test_columns_are_means_of_their_tokens(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    fine, _, _ = record(model, plan_reading(model, ids[0].tolist(), 1000, None))
    reading = plan_reading(model, ids[0].tolist(), 8, None)
    coarse, _, _ = record(model, reading)
    for column, (first, end) in enumerate(itertools.pairwise(reading.starts)):
        np.testing.assert_allclose(coarse.read[column], fine.read[first:end].mean(axis=0), atol=1e-6)


@every_case
def test_a_reading_that_goes_on_inside_a_segment_shows_the_same(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    whole, _, _ = record(model, plan_reading(model, ids[0].tolist(), 1000, None))
    start = SEGMENT + 3
    state = state_after(model, ids[:, :start])
    rest, _, _ = record(model, plan_reading(model, ids[0, start:].tolist(), 1000, state), state)
    np.testing.assert_allclose(rest.norm, whole.norm[1:], rtol=1e-5)
    np.testing.assert_allclose(rest.change, whole.change[1:], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(rest.read, whole.read[start:], atol=1e-5)


@every_case
def test_recording_changes_no_bit(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    reading = plan_reading(model, ids[0].tolist(), 10, None)
    implementation = model.base.config._attn_implementation
    expected = torch.cat([logits for _, logits, _ in read_segments(model, reading, [])])
    _, logits, _ = record(model, reading)
    assert torch.equal(logits, expected)
    assert model.base.config._attn_implementation == implementation
    assert torch.equal(torch.cat([logits for _, logits, _ in read_segments(model, reading, [])]), expected)


def test_windows_hide_memory_tokens_from_the_end_of_a_segment() -> None:
    model, ids = rmt(family("mistral-window")), tokens(1, SEGMENT)
    window = model.blocks[0].window
    assert window is not None
    memory, _, _ = record(model, Reading(ids[0].numpy(), *group_columns([SEGMENT], 100), complete=True))
    place = MEMORY_TOKENS + np.arange(SEGMENT)
    seen = place[:, None] - np.arange(MEMORY_TOKENS) < window
    np.testing.assert_array_equal(memory.read > 0, seen)


# Knocked out


@torch.no_grad()
def logits_without(model: RMTForCausalLM, name: str, ids: Tensor, state: MemoryState | None = None) -> Tensor:
    (part,) = [part for part in token_memory_parts(model) if part.name == name]
    with part.removed():
        return model(ids, past_key_values=MemoryCache(state)).logits


def test_the_parts_are_every_token_or_block_and_all() -> None:
    names = [(p.kind, p.name, p.block, p.index) for p in token_memory_parts(case("rmt-llama"))]
    assert names == [
        ("memory", "memory token 0", None, 0),
        ("memory", "memory token 1", None, 1),
        ("memory", "memory token 2", None, 2),
        ("all", "all memory tokens", None, None),
    ]
    names = [(p.kind, p.name, p.block, p.index) for p in token_memory_parts(case("armt-llama"))]
    assert names == [
        ("block", "memory of block 0", 0, None),
        ("block", "memory of block 1", 1, None),
        ("block", "memory of block 2", 2, None),
        ("all", "all associative memories", None, None),
    ]


@every_case
def test_without_all_of_it_the_logits_are_those_of_the_knocked_out_model(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    everything = next(part.name for part in token_memory_parts(model) if part.kind == "all")
    with torch.no_grad():
        expected, whole = model(ids, knock_out_memory=True).logits, model(ids).logits
    logits = logits_without(model, everything, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(logits[:, :SEGMENT], whole[:, :SEGMENT])
    assert (logits - whole).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole)


@every_token_case
def test_without_one_memory_token_a_segment_finds_it_as_it_was_trained(name: str) -> None:
    model, ids = case(name), tokens(1, 2 * SEGMENT)
    state = state_after(model, ids[:, :SEGMENT])
    memory = state.memory.clone()
    memory[0, 1] = model.memory_tokens.weight[1].detach()
    with torch.no_grad():
        frame = torch.cat([memory, model.get_input_embeddings()(ids[:, SEGMENT:]), memory], dim=1)
        expected = model.base(inputs_embeds=frame, use_cache=False).logits[:, MEMORY_TOKENS:-MEMORY_TOKENS]
    logits = logits_without(model, "memory token 1", ids[:, SEGMENT:], state)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [llama_config, lfm2_config])
def test_without_one_association_its_block_reads_nothing(config) -> None:
    model, ids = rmt(config(), "armt"), tokens(1, 2 * SEGMENT)
    state = state_after(model, ids[:, :SEGMENT])
    logits = logits_without(model, "memory of block 1", ids[:, SEGMENT:], state)
    empty = model.associative_memories[1].empty(1)
    held = [*state.associations]
    held[1] = empty
    with torch.no_grad():
        expected = model(ids[:, SEGMENT:], past_key_values=MemoryCache(type(state)(state.decoder, tuple(held)))).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    with torch.no_grad():
        whole = model(ids[:, SEGMENT:], past_key_values=MemoryCache(state)).logits
    assert (logits - whole).abs().max() > 1e-4
