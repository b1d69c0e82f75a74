"""The promises every model with a memory keeps: causality, padding, cuts, cached generation, saving, independence."""

import lm2_cases
import mom_cases
import pytest
import rmt_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm2_cases import SEGMENT, TOLERANCE, tokens
from transformers import AutoModelForCausalLM

from mnemon.models.memory_model import MemoryModel
from mnemon.models.registration import register
from mnemon.models.state import ARMTState, LM2State, RMTState

EXAMPLES = settings(max_examples=8)
CASES = [*lm2_cases.CASES, *mom_cases.CASES, *rmt_cases.CASES]
BOUNDED = [
    "lfm2-depth-span", "lfm2-layer-span", "lfm2-depth-extended",
    *(name for name in mom_cases.CASES if name not in mom_cases.GROWING),
    *rmt_cases.CASES,
]  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


def case(name: str) -> MemoryModel:
    return next(cases for cases in (lm2_cases, mom_cases, rmt_cases) if name in cases.CASES).case(name)


def logits_of(model: MemoryModel, ids: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1)


@every_case
@EXAMPLES
@given(width=st.integers(2, 31), place=st.data())
def test_changing_a_later_token_never_changes_an_earlier_logit(name, width, place):
    model, ids = case(name), tokens(2, width, width)
    changed_at = place.draw(st.integers(1, width - 1))
    other = ids.clone()
    other[:, changed_at] = (other[:, changed_at] - 3 + 11) % 47 + 3
    before, after = logits_of(model, ids), logits_of(model, other)
    if name not in mom_cases.CASES:
        assert torch.equal(before[:, :changed_at], after[:, :changed_at])
    else:  # the tokens that a memory reads at once are others, so matrix products have other shapes
        assert_close(before[:, :changed_at], after[:, :changed_at])
    assert not torch.equal(before[:, changed_at:], after[:, changed_at:])


@every_case
def test_a_change_reaches_across_segments_through_the_memory(name):
    model, ids = case(name), tokens(1, 6 * SEGMENT)
    other = ids.clone()
    other[:, 0] = 3 if int(ids[0, 0]) != 3 else 4
    far = slice(5 * SEGMENT, None)
    assert (logits_of(model, ids)[:, far] - logits_of(model, other)[:, far]).abs().max() > 1e-6


@every_case
@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 99))
def test_padding_anywhere_and_batching_change_nothing(name, data, seed):
    model, width = case(name), 26
    ids = tokens(3, width, seed)
    rows = st.lists(st.booleans(), min_size=width, max_size=width).filter(any)
    left = data.draw(st.integers(0, width - 1))
    right = data.draw(st.integers(1, width))
    mask = torch.ones(3, width, dtype=torch.long)
    mask[0, :left] = 0
    mask[1, right:] = 0
    mask[2] = torch.tensor(data.draw(rows), dtype=torch.long)
    together = logits_of(model, ids, attention_mask=mask)
    for row in range(3):
        real = mask[row].bool()
        alone = logits_of(model, ids[row : row + 1, real])
        assert_close(together[row][real], alone[0])


@every_case
@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_cut_into_calls_gives_the_logits_of_one_call(name, data, seed):
    model, ids = case(name), tokens(2, 29, seed)
    mask = torch.ones_like(ids)
    mask[1, : data.draw(st.integers(0, 12))] = 0
    cuts = sorted(data.draw(st.sets(st.integers(1, 28), max_size=5)))
    cache, pieces = None, []
    for start, end in zip([0, *cuts], [*cuts, 29], strict=True):
        with torch.no_grad():
            output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache, pieces = output.past_key_values, [*pieces, output.logits]
    real = mask.bool()
    assert_close(torch.cat(pieces, dim=1)[real], logits_of(model, ids, attention_mask=mask)[real])


@every_case
def test_a_fully_masked_call_leaves_every_state_exactly_unchanged(name):
    model, ids = case(name), tokens(2, 17)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        before = cache.state
        cache = model(ids, attention_mask=torch.zeros_like(ids), past_key_values=cache).past_key_values
    assert cache.state is before


@every_case
def test_a_masked_row_leaves_its_own_state_exactly_unchanged(name):
    model, ids = case(name), tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        before = cache.state
        after = model(tokens(2, 17, 1), attention_mask=mask, past_key_values=cache).past_key_values.state
    assert after.counts == (34, 17)
    for block, old, new in zip(model.blocks, before.decoder.base, after.decoder.base, strict=True):
        if not block.has_keys:  # keys of an attention block gain blank columns nobody sees
            assert all(torch.equal(a[1], b[1]) for a, b in zip(old, new, strict=True))
            assert not all(torch.equal(a[0], b[0]) for a, b in zip(old, new, strict=True))
    if isinstance(before, RMTState | ARMTState):
        for old, new in zip(rmt_cases.memory_of(before), rmt_cases.memory_of(after), strict=True):
            assert torch.equal(old[1], new[1])
            assert not torch.equal(old[0], new[0])
    if isinstance(before, LM2State):
        assert torch.equal(before.bank[1], after.bank[1])
        for old, new in zip(before.statistics, after.statistics, strict=True):
            assert all(torch.equal(a[1], b[1]) for a, b in zip(old.tensors, new.tensors, strict=True))


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "beam search": {"do_sample": False, "num_beams": 3},
}


@every_case
@pytest.mark.parametrize("mode", GENERATION)
def test_cached_generation_equals_uncached(name, mode):
    model, ids = case(name), tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, pad_token_id=0, **GENERATION[mode]
            )
        )
    assert torch.equal(*results)


@every_case
def test_a_left_padded_row_generates_what_it_generates_alone(name):
    model, ids = case(name), tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 4:], attention_mask=mask[1:, 4:], **options)
    assert torch.equal(together[1, 11 : 4 + alone.shape[1]], alone[0, 7:])


def differing_keys(one: dict, other: dict) -> set[str]:
    """Names of the entries, at any depth, in which two configurations differ."""
    different = set()
    for key in one.keys() | other.keys():
        if isinstance(one.get(key), dict) and isinstance(other.get(key), dict):
            different |= differing_keys(one[key], other[key])
        elif one.get(key) != other.get(key):
            different.add(key)
    return different


@every_case
def test_saving_and_loading_is_exact(name, tmp_path):
    register()
    model, ids = case(name), tokens(2, 20)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert differing_keys(again.config.to_dict(), model.config.to_dict()) <= {"_name_or_path", "dtype"}
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@every_case
def test_a_batch_never_depends_on_an_earlier_batch(name):
    model, ids = case(name), tokens(2, 20)
    first = logits_of(model, ids)
    logits_of(model, tokens(2, 31, 5))
    model.generate(tokens(3, 9, 6), max_new_tokens=9, pad_token_id=0)
    assert torch.equal(logits_of(model, ids), first)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_state_without_full_attention_stops_growing(name):
    model = case(name)
    sizes = []
    with torch.no_grad():
        cache = None
        for step in range(3 * SEGMENT):
            output = model(tokens(1, 5, step), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            sizes.append(cache.state.num_bytes())
    # After that many calls a segment stands where it stood before: what is kept of it comes and goes.
    assert sizes[SEGMENT : 2 * SEGMENT] == sizes[2 * SEGMENT :]
    if name not in rmt_cases.CASES:
        assert len(set(sizes[3:])) == 1


@pytest.mark.parametrize("name", ["lfm2-depth-span", *mom_cases.CASES, *rmt_cases.CASES])
def test_generation_continues_from_a_memory_and_leaves_it_unchanged(name):
    model, ids = case(name), tokens(2, 40)
    with torch.no_grad():
        state = model(ids[:, :30], use_cache=True).past_key_values.state
    before = [tensor.clone() for tensor in state.tensors()]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    continued = model.generate(ids[:, 30:], memory=state, **options)
    whole = model.generate(ids, **options)
    assert torch.equal(continued[:, 10:], whole[:, 40:])
    assert all(torch.equal(old, now) for old, now in zip(before, state.tensors(), strict=True))
    assert state.counts == (30, 30)
    assert torch.equal(model.generate(ids[:, 30:], memory=state, **options), continued)
