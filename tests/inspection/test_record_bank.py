"""The bank recorder against the equations, in both flows, and what it must not do: change anything."""

import functools
import math

import numpy as np
import pytest
import torch
from bank_cases import by_definition, word_tokenizer
from families import family
from lm2_cases import SEGMENT, lfm2_config, llama_config, lm2, tokens
from mom_cases import lm2_on_mom
from transformers import AutoModelForCausalLM

from mnemon.inspection.reading import plan_reading, read_segments
from mnemon.inspection.record_bank import (
    BankRecorder,
    SlotWords,
    final_norm,
    half_life,
    look_up_segments,
    most_read_slots,
)
from mnemon.inspection.taps import calls_through
from mnemon.inspection.trace import BankBlock, column_means
from mnemon.layers.memory_bank import rms_normalise
from mnemon.layers.memory_diagnostics import written_share
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.state import LM2State, MemoryCache

OPTIONS = {
    "depth": {"flow": "depth"},
    "layer": {"flow": "layer"},
    "depth-span": {"flow": "depth", "attention_span": 9},
    "layer-top-k": {"flow": "layer", "read_top_k": 2},
    "depth-stretch": {"flow": "depth", "gate_stretch": 0.1},
    "layer-one-block": {"flow": "layer", "memory_layers": [1], "num_slots": 14},
    "depth-some-blocks": {"flow": "depth", "memory_layers": [0, 2], "num_memory_heads": 1},
}
LENGTH = 3 * SEGMENT + 4


@functools.lru_cache
def model_of(name: str) -> LM2ForCausalLM:
    return lm2(llama_config(), **OPTIONS[name])


def recorded(
    model: LM2ForCausalLM, ids: torch.Tensor, state: LM2State | None = None, columns: int = 10**6, **options
) -> tuple[tuple[BankBlock, ...], torch.Tensor]:
    """Record a text [T] in full precision; returns the blocks and the logits."""
    reading = plan_reading(model, ids.tolist(), columns, state)
    recorder = BankRecorder(model, word_tokenizer(), reading, state, precision=np.float64, **options)
    logits = torch.cat([logits for _, logits, _ in read_segments(model, reading, [recorder], state)])
    return recorder.blocks(), logits


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_recorded_is_what_the_equations_say(name: str) -> None:
    model, ids = model_of(name), tokens(1, LENGTH)[0]
    blocks, _ = recorded(model, ids)
    assert [block.block for block in blocks] == [int(index) for index in model.memory]
    for block, seen in zip(blocks, by_definition(model, ids), strict=True):
        for field in ("read", "read_after", "write", "output_gate", "input_gate", "forget_gate", "change"):
            np.testing.assert_allclose(getattr(block, field), getattr(seen, field), atol=1e-9, err_msg=field)
        rate = np.nanmean(seen.kept, axis=0)
        np.testing.assert_allclose(block.half_life, np.log(0.5) / np.log(rate), rtol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_shares_add_up_to_one(name: str) -> None:
    blocks, _ = recorded(model_of(name), tokens(1, LENGTH)[0])
    for block in blocks:
        np.testing.assert_allclose(block.read.sum(axis=1), 1, atol=1e-12)
        np.testing.assert_allclose(block.read_after[: 3 * SEGMENT].sum(axis=1), 1, atol=1e-12)
        written = np.add.reduceat(block.write, range(0, LENGTH, SEGMENT))
        np.testing.assert_allclose(written, 1, atol=1e-12)


def test_read_mass_on_written_content_follows_the_bank_that_stood() -> None:
    model, ids = model_of("layer"), tokens(1, LENGTH)[0]
    blocks, _ = recorded(model, ids)
    cache = MemoryCache()
    for segment in range(3):
        columns = slice(segment * SEGMENT, (segment + 1) * SEGMENT)
        state = model.initial_state(1) if cache.state is None else cache.state
        before = written_share(state.bank, state.kept, model.initial_memory)[0]
        with torch.no_grad():
            model(input_ids=ids[None, columns], past_key_values=cache)
        after = written_share(cache.state.bank, cache.state.kept, model.initial_memory)[0]
        for order, block in enumerate(blocks):
            np.testing.assert_allclose(block.read_on_written[columns], block.read[columns] @ before[order].numpy())
            np.testing.assert_allclose(block.written_share[segment], after[order].numpy())


@pytest.mark.parametrize("name", [*OPTIONS, "lfm2", "lm2-on-mom"])
def test_recording_changes_no_logit_and_reading_in_segments_none(name: str) -> None:
    others = {"lfm2": lambda: lm2(lfm2_config()), "lm2-on-mom": lm2_on_mom}
    model = others[name]() if name in others else model_of(name)
    ids = tokens(1, LENGTH)[0]
    blocks, logits = recorded(model, ids)
    with torch.no_grad():
        plain = model(input_ids=ids[None]).logits[0]
    assert torch.equal(logits, plain)
    assert all(np.isfinite(block.read).all() for block in blocks)


def test_going_on_from_a_state_inside_a_segment_records_what_one_reading_does() -> None:
    for name in ("depth", "layer"):
        model, ids, cut = model_of(name), tokens(1, LENGTH)[0], SEGMENT + 3
        whole, _ = recorded(model, ids)
        cache = MemoryCache()
        with torch.no_grad():
            model(input_ids=ids[None, :cut], past_key_values=cache)
        rest, _ = recorded(model, ids[cut:], cache.state)
        for one, two in zip(whole, rest, strict=True):
            for field in ("read", "read_after", "write", "output_gate", "read_on_written"):
                np.testing.assert_allclose(getattr(one, field)[cut:], getattr(two, field), atol=1e-9)
            for field in ("input_gate", "forget_gate", "written_share", "change"):
                np.testing.assert_allclose(getattr(one, field)[1:], getattr(two, field), atol=1e-9)


def test_grouped_columns_are_means_of_reads_and_sums_of_writes() -> None:
    model, ids = model_of("layer"), tokens(1, LENGTH)[0]
    fine, _ = recorded(model, ids)
    coarse, _ = recorded(model, ids, columns=9)
    starts = plan_reading(model, ids.tolist(), 9, None).starts
    assert np.diff(starts).max() > 1
    for one, two in zip(fine, coarse, strict=True):
        np.testing.assert_allclose(column_means(one.read, starts), two.read, atol=1e-12)
        np.testing.assert_allclose(column_means(one.output_gate, starts), two.output_gate, atol=1e-12)
        np.testing.assert_allclose(np.add.reduceat(one.write, starts[:-1]), two.write, atol=1e-12)


@pytest.mark.parametrize("flow", ["depth", "layer"])
def test_the_slots_that_are_kept_are_those_that_are_read_most(flow: str) -> None:
    model, ids = model_of(flow), tokens(1, LENGTH)[0]
    every, _ = recorded(model, ids)
    chosen = most_read_slots(model, plan_reading(model, ids.tolist(), 10**6, None), None, 2)
    some, _ = recorded(model, ids, slots=chosen)
    mass = [block.read.sum(axis=0) for block in every]
    mass = [sum(mass)] * len(mass) if flow == "depth" else mass
    for one, two, counts in zip(every, some, mass, strict=True):
        np.testing.assert_array_equal(two.slots, sorted(np.argsort(-counts)[:2]))
        np.testing.assert_array_equal(one.read[:, two.slots], two.read)
        np.testing.assert_array_equal(one.forget_gate[:, two.slots], two.forget_gate)
        np.testing.assert_array_equal(one.half_life[two.slots], two.half_life)


def test_a_text_within_one_segment_writes_nothing() -> None:
    blocks, _ = recorded(model_of("depth"), tokens(1, SEGMENT - 1)[0])
    for block in blocks:
        assert np.isnan(block.input_gate).all()
        assert np.isnan(block.read_after).all()
        assert np.isnan(block.half_life).all()
        assert block.words == ()
        assert block.word_scores.shape == (0, 5, 5)


def test_half_lives_of_known_rates() -> None:
    found = half_life(np.array([1.0, 0.5, 0.0, 0.25, 0.85, np.nan]))
    expected = [np.inf, 1.0, 0.0, 0.5, math.log(0.5) / math.log(0.85), np.nan]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_nearest_words_are_those_of_the_value_path_through_norm_and_head() -> None:
    model, ids = model_of("layer"), tokens(1, 2 * SEGMENT)[0]
    blocks, _ = recorded(model, ids)
    cache = MemoryCache()
    with torch.no_grad():
        model(input_ids=ids[None], past_key_values=cache)
        for order, (block, bank) in enumerate(zip(blocks, model.banks, strict=True)):
            slots = cache.state.bank[0, order]
            hidden = rms_normalise(slots) @ bank.read_value.weight.T @ bank.output.weight.T
            logits = model.base.lm_head(model.base.model.norm(hidden))
            assert block.word_segments.tolist() == [0, 1]
            assert block.words[1][3][0] == f"w{int(logits[3].argmax())}"
            np.testing.assert_allclose(block.word_scores[1], logits.topk(5).values.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "lfm2", "gpt2", "gpt_neox", "gemma2"])
def test_the_final_norm_is_found_by_structure(kind: str) -> None:
    config = {"llama": llama_config, "lfm2": lfm2_config}[kind]() if kind in ("llama", "lfm2") else family(kind)
    base = AutoModelForCausalLM.from_config(config).eval()
    seen = {}
    norm = final_norm(base)
    norm.register_forward_hook(lambda _, __, output: seen.update(norm=output))
    base.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.update(head=args[0]))
    with torch.no_grad():
        base(input_ids=torch.arange(4)[None])
    assert torch.equal(seen["norm"], seen["head"])


def test_words_are_looked_up_first_last_and_between() -> None:
    model = model_of("depth")
    reading = plan_reading(model, tokens(1, 20 * SEGMENT + 1)[0].tolist(), 10**6, None)
    chosen = look_up_segments(reading, 5, holds_something=False)
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 19, 5)
    assert look_up_segments(reading, 30, holds_something=True) == list(range(-1, 20))
    assert SlotWords(model, word_tokenizer(), few=2).nearest(0, model.initial_memory)[1].shape == (5, 2)


def test_wrapped_methods_nest_and_leave_nothing_behind() -> None:
    module, order = torch.nn.Linear(2, 2), []

    def noting(name: str):
        def wrapper(original, *args):
            order.append(name)
            return original(*args)

        return wrapper

    with calls_through(module, "extra_repr", noting("outer")):
        with calls_through(module, "extra_repr", noting("inner")):
            module.extra_repr()
        with pytest.raises(TypeError), calls_through(module, "extra_repr", noting("failing")):
            module.extra_repr("too many")
        module.extra_repr()
    module.extra_repr()
    assert order == ["inner", "outer", "failing", "outer", "outer"]
    assert "extra_repr" not in vars(module)


def test_a_model_in_half_precision_is_recorded_in_single_precision() -> None:
    model, ids = lm2(llama_config()).to(torch.bfloat16), tokens(1, LENGTH)[0]
    exact, _ = recorded(lm2(llama_config()), ids)
    blocks, logits = recorded(model, ids)
    with torch.no_grad():
        assert torch.equal(logits, model(input_ids=ids[None]).logits[0])
    for one, two in zip(exact, blocks, strict=True):
        np.testing.assert_allclose(two.read.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(np.add.reduceat(two.write, range(0, LENGTH, SEGMENT)), 1, atol=1e-5)
        np.testing.assert_allclose(one.read[:SEGMENT], two.read[:SEGMENT], atol=0.05)
