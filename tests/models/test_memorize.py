"""`memorize`: any cut gives the same bits, rows are independent, and what waits for a whole block is never lost."""

import hashlib
from collections.abc import Sequence

import lm2_cases
import mom_cases
import pytest
import rmt_cases
import torch
from families import family
from hypothesis import given, settings
from hypothesis import strategies as st
from lm2_cases import SEGMENT, llama_config, lm2, tokens
from transformers import DynamicCache

from mnemon.errors import ShapeError, StateError
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.memory_model import MemoryModel
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.state import MemoryCache, MemoryState

LM2 = ("llama-depth-span", "llama-layer-full", "lfm2-depth-span", "lfm2-depth-extended")
CASES = [*LM2, *mom_cases.CASES, *rmt_cases.CASES]
every_case = pytest.mark.parametrize("name", CASES)
BLOCK = SEGMENT
LONG = 5 * BLOCK + 3


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnemon.models.modeling_mom._BLOCK_LENGTH", BLOCK)
    monkeypatch.setattr("mnemon.models.modeling_lm2._CALL_LENGTH", BLOCK)


def case(name: str) -> MemoryModel:
    return next(cases for cases in (lm2_cases, mom_cases, rmt_cases) if name in cases.CASES).case(name)


def digest(state: MemoryState) -> str:
    """Return a checksum of everything a state says."""
    found = hashlib.sha256(repr((state.counts, state.pending, state.tokens_read)).encode())
    for tensor in state.tensors():
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
    for positions in state.decoder.key_positions:
        found.update(positions.tobytes())
    return found.hexdigest()


def in_pieces(model: MemoryModel, ids: torch.Tensor, cuts: Sequence[int]) -> MemoryState:
    state = None
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        state = model.memorize(ids[:, start:end], state=state)
    return state


def next_logits(model: MemoryModel, state: MemoryState, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, memory=state).logits


@every_case
@settings(max_examples=4)
@given(cuts=st.sets(st.integers(1, LONG - 1), max_size=5), seed=st.integers(0, 9))
def test_any_cut_gives_the_same_bits(name, cuts, seed):
    model, ids = case(name), tokens(2, LONG, seed)
    assert digest(in_pieces(model, ids, sorted(cuts))) == digest(model.memorize(ids))


@settings(max_examples=8)
@given(cuts=st.sets(st.integers(1, LONG - 1), max_size=5), seed=st.integers(0, 9))
def test_any_cut_gives_the_same_bits_where_a_block_is_several_segments(cuts, seed):
    model, ids = case("llama-layer-full"), tokens(2, LONG, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mnemon.models.modeling_lm2._CALL_LENGTH", 2 * BLOCK)
        whole = model.memorize(ids)
        assert whole.counts == (4 * BLOCK, 4 * BLOCK)
        assert digest(in_pieces(model, ids, sorted(cuts))) == digest(whole)


@every_case
def test_reading_on_gives_the_logits_of_the_whole_text(name):
    model, ids = case(name), tokens(2, LONG + 4)
    state = model.memorize(ids[:, :LONG])
    assert state.tokens_read == (LONG, LONG)
    assert state.counts == (5 * BLOCK, 5 * BLOCK)
    assert [list(row) for row in state.pending] == ids[:, 5 * BLOCK : LONG].tolist()
    with torch.no_grad():
        whole = model(ids).logits[:, LONG:]
    assert torch.allclose(next_logits(model, state, ids[:, LONG:]), whole, atol=1e-6)


@every_case
def test_ragged_rows_are_those_read_alone(name):
    model, ids = case(name), tokens(3, LONG)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[1, BLOCK - 2 :] = 0
    together = model.memorize(ids[:, 20:], mask[:, 20:], model.memorize(ids[:, :20], mask[:, :20]))
    after = tokens(3, 5, 7)
    found = next_logits(model, together, after)
    for row in range(3):
        alone = model.memorize(ids[row : row + 1, mask[row].bool()])
        assert together.tokens_read[row] == alone.tokens_read[0]
        assert (together.pending or ((),) * 3)[row] == (alone.pending or ((),))[0]
        assert torch.allclose(found[row], next_logits(model, alone, after[row : row + 1])[0], atol=1e-6)


def assert_separate(model: MemoryModel, rows: int, tolerance: float) -> None:
    """Compare memories read in one batch, and memories put side by side afterwards, with each alone."""
    ids, after = tokens(rows, LONG), tokens(rows, 4, 3)
    separate = [model.memorize(row[None]) for row in ids]
    alone = torch.cat([next_logits(model, state, row[None]) for state, row in zip(separate, after, strict=True)])
    for together in (model.memorize(ids), MemoryState.stack(separate)):
        assert (next_logits(model, together, after) - alone).abs().max() <= tolerance * alone.abs().max().clamp_min(1)


@every_case
def test_memories_side_by_side_are_separate_ones(name):
    assert_separate(case(name), 3, 1e-6)


SMALL = llama_config(initializer_range=0.02)
AS_INITIALISED = {
    "lm2": lambda: LM2ForCausalLM(LM2Config(base_config=SMALL, num_slots=5, slot_dim=12, segment_length=BLOCK)),
    "mom": lambda: mom_cases.mom(SMALL).float(),
    "rmt": lambda: rmt_cases.rmt(SMALL).float(),
    "armt": lambda: rmt_cases.rmt(SMALL, "armt").float(),
}


@pytest.mark.parametrize("name", AS_INITIALISED)
def test_ten_memories_side_by_side_are_ten_separate_ones_in_single_precision(name):
    torch.manual_seed(0)
    assert_separate(AS_INITIALISED[name]().eval(), 10, 1e-6)


@every_case
def test_generation_reads_what_waits_and_repeats(name):
    model, ids = case(name), tokens(2, LONG + 3)
    state = model.memorize(ids[:, :LONG])
    before = digest(state)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids[:, LONG:], memory=state, **options)
    assert torch.equal(found[:, 3:], model.generate(ids, **options)[:, LONG + 3 :])
    assert torch.equal(found, model.generate(ids[:, LONG:], memory=state, **options))
    assert digest(state) == before


@every_case
def test_forward_goes_on_from_a_memory_and_leaves_it_as_it_was(name):
    model, ids = case(name), tokens(2, LONG + 3)
    state = model.memorize(ids[:, :LONG])
    before = digest(state)
    with torch.no_grad():
        found = model(ids[:, LONG:], labels=ids[:, LONG:], memory=state)
        expected = model(ids[:, LONG:], labels=ids[:, LONG:], past_key_values=MemoryCache(state))
        blank = model(ids[:, LONG:])
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert not torch.allclose(found.logits, blank.logits)
    assert found.past_key_values.state.tokens_read == (LONG + 3, LONG + 3)
    assert digest(state) == before


@every_case
def test_a_memory_that_would_be_ignored_is_refused(name):
    model, ids = case(name), tokens(2, 7)
    state = model.memorize(ids)
    with pytest.raises(StateError, match="as memory=, not as state="):
        model(ids, state=state)
    with pytest.raises(StateError, match="choose one"):
        model(ids, memory=state, past_key_values=MemoryCache(state))
    with pytest.raises(StateError, match="the memory holds 2 rows, the input has 1"):
        model(ids[:1], memory=state)
    with pytest.raises(StateError, match="expected a MemoryState, got str"):
        model(ids, memory="book.memory.safetensors")


def test_what_waits_can_be_read_alone():
    model, ids = lm2(llama_config(), attention_span=9), tokens(2, LONG)
    state = model.read_pending(model.memorize(ids))
    assert state.pending == ()
    assert state.counts == state.tokens_read == (LONG, LONG)
    with torch.no_grad():
        expected = model(ids, use_cache=True).past_key_values.state
    assert torch.allclose(state.bank, expected.bank, atol=1e-9)
    assert model.read_pending(state) is state


def test_beams_and_several_answers_each_go_on_from_the_memory():
    model, ids = lm2(llama_config(), attention_span=9), tokens(2, LONG + 3)
    state = model.memorize(ids[:, :LONG])
    for extra in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **extra}
        found = model.generate(ids[:, LONG:], memory=state, **options)
        assert torch.equal(found[:, 3:], model.generate(ids, **options)[:, LONG + 3 :])


def test_the_memory_knows_no_gradient_no_dropout_and_leaves_the_mode_as_it_was():
    base = llama_config(attention_dropout=0.5)
    model = lm2(base, attention_span=9).train()
    states = [model.memorize(tokens(1, LONG)) for _ in range(2)]
    assert digest(states[0]) == digest(states[1])
    assert model.training
    assert model.base.model.layers[0].training
    assert not any(tensor.requires_grad for tensor in states[0].tensors())


def test_no_logits_are_computed():
    model = lm2(llama_config(), attention_span=9)
    model.segmented.prepare()
    widths = []
    model.base.lm_head.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    model.memorize(tokens(1, LONG))
    assert widths == [0] * 5


def test_a_state_in_the_middle_of_a_block_is_completed_first():
    model, ids = lm2(llama_config(), attention_span=9), tokens(2, 4 * BLOCK)
    with torch.no_grad():
        started = model(ids[:, : BLOCK + 2], use_cache=True).past_key_values.state
    state = model.memorize(ids[:, BLOCK + 2 :], state=started)
    assert state.counts == (4 * BLOCK,) * 2
    assert torch.allclose(state.bank, model.memorize(ids).bank, atol=1e-9)


def test_what_waits_is_detached_moved_branched_chosen_and_counted_with_the_rest():
    model, ids = lm2(llama_config(), attention_span=9), tokens(3, 2 * BLOCK + 2)
    state = model.memorize(ids)
    for same in (state.detach(), state.to("cpu"), state.branch()):
        assert same.pending == state.pending
        assert same.origin is state.origin
    chosen = state.select(torch.tensor([2, 0, 2]))
    assert chosen.pending == (state.pending[2], state.pending[0], state.pending[2])
    assert chosen.tokens_read == state.tokens_read
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors())
    assert state.num_bytes() == tensors + 3 * 2 * 8


def test_the_state_handed_in_is_not_changed():
    model, ids = lm2(llama_config(), attention_span=9), tokens(1, 30)
    state = model.memorize(ids)
    before = digest(state)
    model.memorize(ids, state=state)
    next_logits(model, state, ids)
    assert digest(state) == before


def test_a_knocked_out_memory_is_knocked_out_for_what_waits_too():
    model, ids = lm2(llama_config(), attention_span=9), tokens(1, BLOCK + 4)
    state = model.memorize(ids[:, :-1])
    with torch.no_grad():
        found = model(ids[:, -1:], past_key_values=MemoryCache(state), knock_out_memory=True).logits
        first = model(ids[:, :BLOCK], use_cache=True).past_key_values
        expected = model(ids[:, BLOCK:], past_key_values=first, knock_out_memory=True).logits[:, -1:]
        otherwise = next_logits(model, state, ids[:, -1:])
    assert torch.allclose(found, expected, atol=1e-9)
    assert not torch.allclose(found, otherwise, atol=1e-3)


def test_routing_counts_every_layer_once_where_tokens_wait():
    model, ids = mom_cases.case("mom"), tokens(1, BLOCK + 4)
    state = model.memorize(ids[:, :-2])
    with torch.no_grad():
        output = model(ids[:, -2:], past_key_values=MemoryCache(state), output_routing=True)
    assert output.loads.shape == (3, 3)


def test_a_text_that_full_attention_cannot_hold_is_refused_before_it_is_read():
    model = lm2(llama_config(max_position_embeddings=20))
    state = model.memorize(tokens(1, 18))
    with pytest.raises(ShapeError, match=r"21 tokens are more than the 20 positions of llama.*attention_span"):
        model.memorize(tokens(1, 3), state=state)
    assert lm2(llama_config(max_position_embeddings=20), attention_span=9).memorize(tokens(1, 40)).tokens_read == (40,)
    assert rmt_cases.rmt(family("gpt2")).memorize(tokens(1, 2000)).tokens_read == (2000,)
    mixed = mom_cases.mom(llama_config(max_position_embeddings=20), layer_types=["mom", "full_attention", "mom"])
    with pytest.raises(ShapeError, match="attention sees all of them"):
        mixed.memorize(tokens(1, 21))


@pytest.mark.parametrize(
    ("ids", "mask", "state", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), None, None, "expected inputs of shape"),
        (torch.tensor([[51]]), None, None, "outside the vocabulary"),
        (torch.tensor([[1.0]]), None, None, "must be integers"),
        (torch.tensor([[1]]), torch.ones(2, 1), None, "attention_mask must be"),
        (torch.tensor([[1]]), None, DynamicCache(), "expected a MemoryState, got DynamicCache"),
    ],
)
def test_nonsense_is_refused(ids, mask, state, message):
    model = lm2(llama_config(), attention_span=9)
    with pytest.raises((ShapeError, StateError), match=message):
        model.memorize(ids, mask, state)


def test_a_state_of_another_batch_size_is_refused():
    model = lm2(llama_config(), attention_span=9)
    with pytest.raises(StateError, match="holds 2 rows, the input has 1"):
        model.memorize(tokens(1, 3), state=model.memorize(tokens(2, 3)))


@pytest.mark.parametrize("name", ["llama-layer-full", "llama-depth-span", "rmt-llama", "mistral-both"])
def test_memories_of_texts_of_different_lengths_stand_side_by_side(name):
    model = case(name)
    lengths = (2, 3 * BLOCK + 1, 6 * BLOCK) if name not in mom_cases.CASES else (BLOCK, 3 * BLOCK + 1, 6 * BLOCK)
    states = [model.memorize(tokens(1, length, length)) for length in lengths]
    stacked = MemoryState.stack(states)
    assert stacked.tokens_read == lengths
    after = tokens(3, 5, 1)
    found = next_logits(model, stacked, after)
    for row, state in enumerate(states):
        assert torch.allclose(found[row], next_logits(model, state, after[row : row + 1])[0], atol=1e-6)


def test_memories_that_do_not_belong_together_are_refused():
    one, other = lm2(llama_config(), attention_span=9), lm2(llama_config(), 1, attention_span=9)
    ids = tokens(1, 20)
    with pytest.raises(StateError, match="made by different weights"):
        MemoryState.stack([one.memorize(ids), other.memorize(ids)])
    with pytest.raises(StateError, match="of different models"):
        MemoryState.stack([one.memorize(ids), rmt_cases.rmt(llama_config()).memorize(ids)])
    with pytest.raises(StateError, match="no memory to put side by side"):
        MemoryState.stack([])
    mixture = mom_cases.case("mom")
    with pytest.raises(StateError, match="holds nothing yet"):
        MemoryState.stack([mixture.memorize(ids), mixture.memorize(ids[:, :2])])
