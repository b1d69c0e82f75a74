"""A whole recording: what goes into the trace, from texts, samples and memories, and what is refused."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from bank_cases import word_tokenizer
from lm2_cases import SEGMENT, llama_config, lm2, tokens
from mom_cases import MIXED, lm2_on_mom, mom
from rmt_cases import rmt
from transformers import AutoModelForCausalLM

from mnemon.data.babilong import generate
from mnemon.errors import ConfigError, DataError, MnemonError, ShapeError, StateError
from mnemon.inspection.predictions import NextTokens, greedy_answer
from mnemon.inspection.reading import plan_reading, read_segments, segment_length
from mnemon.inspection.record import column_texts, record
from mnemon.inspection.record_mixture import mixture_parts
from mnemon.inspection.sources import babilong_source, memory_source, sample_source, text_source
from mnemon.inspection.trace import Source, Trace, load_trace, save_trace
from mnemon.models.loading import load_model
from mnemon.models.memory_model import MemoryModel
from mnemon.models.provenance import model_fingerprint
from mnemon.models.state import MemoryCache, MemoryState

TEXT = Source("text", "made up")
LENGTH = 3 * SEGMENT + 4
MODELS = {
    "lm2-depth": lambda: lm2(llama_config()),
    "lm2-layer": lambda: lm2(llama_config(), flow="layer"),
    "lm2-on-mom": lm2_on_mom,
    "rmt": lambda: rmt(llama_config()),
    "armt": lambda: rmt(llama_config(), "armt"),
    "mom": lambda: mom(**MIXED),
}


@functools.lru_cache
def model_of(name: str) -> MemoryModel:
    return MODELS[name]()


@functools.lru_cache
def shipped():
    return load_model("babilong-tiny-lm2")


def recorded(model: str, ids: torch.Tensor, **options) -> Trace:
    return record(model_of(model), word_tokenizer(), ids.tolist(), TEXT, **options)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_plain_calls(name: str) -> None:
    model, ids = model_of(name), tokens(1, LENGTH)[0]
    found = recorded(name, ids).predictions
    sides = [({}, found.with_memory, found.likeliest_with)]
    if name != "mom":
        sides.append(({"knock_out_memory": True}, found.without_memory, found.likeliest_without))
    for options, means, words in sides:
        with torch.no_grad():
            logits = model(input_ids=ids[None], **options).logits[0]
        expected = logits.log_softmax(dim=-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()
        assert np.isnan(means[0])
        np.testing.assert_allclose(means[1:], expected, atol=1e-5)
        assert list(words) == [f"w{index}" for index in logits.argmax(dim=-1).tolist()]


def test_grouped_predictions_are_means_of_what_is_known() -> None:
    model, ids = model_of("lm2-depth"), tokens(1, LENGTH)[0]
    fine, coarse = recorded("lm2-depth", ids), recorded("lm2-depth", ids, max_columns=9)
    starts = coarse.text.starts
    each = fine.predictions.with_memory
    expected = [np.nanmean(each[first:end]) for first, end in itertools.pairwise(starts)]
    np.testing.assert_allclose(coarse.predictions.with_memory, expected, atol=1e-6)
    assert coarse.predictions.likeliest_with == tuple(fine.predictions.likeliest_with[end - 1] for end in starts[1:])
    assert any("columns of up to 4" in note for note in coarse.notes)
    assert not any("columns" in note for note in fine.notes)
    assert model.training is False


def test_logits_are_taken_in_segments_as_in_one_piece() -> None:
    model, ids = model_of("lm2-layer"), tokens(1, LENGTH)[0]
    reading = plan_reading(model, ids.tolist(), 10**6, None)
    pieces, whole = (
        NextTokens(reading),
        NextTokens(plan_reading(rmt(llama_config(), segment_length=64), ids.tolist(), 99, None)),
    )
    logits = []
    for segment, piece, _ in read_segments(model, reading, []):
        pieces.take(segment, piece)
        logits.append(piece)
    whole.take(whole.reading.segment(0), torch.cat(logits))
    np.testing.assert_allclose(pieces.log_probabilities, whole.log_probabilities, atol=1e-6)
    np.testing.assert_array_equal(pieces.likeliest, whole.likeliest)


def test_a_trace_says_what_was_read_and_comes_back_from_its_file(tmp_path: Path) -> None:
    ids = tokens(1, LENGTH)[0]
    trace = recorded("lm2-depth", ids, target=[7, 8], question_start=LENGTH - 6, name="tiny")
    assert (trace.model, trace.family, trace.source) == ("tiny", "lm2", TEXT)
    assert trace.fingerprint == model_fingerprint(model_of("lm2-depth"))
    assert trace.text.num_tokens == LENGTH + 2
    assert "".join(trace.text.pieces).split() == [f"w{index}" for index in [*ids.tolist(), 7, 8]]
    assert trace.text.segments.tolist() == [0, 7, 14, 21, 27]
    assert not trace.text.complete
    assert any("incomplete" in note for note in trace.notes)
    assert trace.knock_outs.target == "w7 w8"
    assert not any("own" in note for note in trace.notes)
    known = trace.predictions.with_memory[-2:].mean()
    assert trace.knock_outs.log_probability == pytest.approx(known, abs=1e-5)
    back = load_trace(save_trace(tmp_path / "a.trace.safetensors", trace))
    assert back.knock_outs == trace.knock_outs
    np.testing.assert_array_equal(back.bank[1].write, trace.bank[1].write)


def test_the_causal_check_begins_with_the_segment_of_the_question() -> None:
    ids = tokens(1, LENGTH)[0]
    model = model_of("lm2-layer")
    for start, first in ((SEGMENT + 2, SEGMENT), (2 * SEGMENT, 2 * SEGMENT), (None, 3 * SEGMENT)):
        trace = recorded("lm2-layer", ids, target=[9], question_start=start)
        assert any(f"the last {LENGTH + 1 - first} tokens" in note for note in trace.notes)
        cache = MemoryCache()
        with torch.no_grad():
            model(input_ids=ids[None, :first], past_key_values=cache)
            logits = model(input_ids=ids[None, first:], past_key_values=cache, knock_out_memory=True).logits[0, -1]
        (everything,) = (part for part in trace.knock_outs.parts if part.kind == "all")
        assert everything.log_probability == pytest.approx(float(logits.log_softmax(dim=-1)[9]), abs=1e-6)


def test_only_some_of_many_slots_are_shown_and_the_trace_says_so() -> None:
    trace = recorded("lm2-layer", tokens(1, LENGTH)[0], max_slots=2, max_knock_outs=3)
    assert [len(block.slots) for block in trace.bank] == [2, 2, 2]
    assert "of 5 slots, the 2 that are read most are shown" in trace.notes
    assert sum(part.kind == "slot" for part in trace.knock_outs.parts) == 3


def test_a_trace_of_many_tokens_and_slots_keeps_to_its_budget(tmp_path: Path) -> None:
    sizes = {"vocab_size": 500, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    base = llama_config(num_hidden_layers=4, num_key_value_heads=1, max_position_embeddings=10**6, **sizes)
    bank = {"num_slots": 80, "slot_dim": 8, "num_memory_heads": 1, "segment_length": 256, "attention_span": 256}
    model = lm2(base, flow="layer", **bank).float()
    trace = record(model, word_tokenizer(500), tokens(1, 12_000)[0].tolist(), TEXT)
    assert [block.read.shape[1] for block in trace.bank] == [64] * 4
    assert 1000 < trace.text.num_columns < 4000
    assert save_trace(tmp_path / "a.trace.safetensors", trace).stat().st_size < 6_000_000


def test_one_token_alone_is_recorded_without_a_causal_check() -> None:
    trace = recorded("lm2-depth", tokens(1, 1)[0])
    assert trace.knock_outs is None
    assert np.isnan(trace.predictions.with_memory).all()
    assert len(trace.bank) == 3


@pytest.mark.parametrize("name", ["lm2-on-mom", "mom", "rmt", "armt"])
def test_every_memory_that_a_model_holds_is_recorded_and_knocked_out(name: str) -> None:
    trace = recorded(name, tokens(1, LENGTH)[0])
    assert trace.family == {"lm2-on-mom": "lm2", "armt": "rmt"}.get(name, name)
    assert [block.block for block in trace.bank] == ([0, 1, 2] if name == "lm2-on-mom" else [])
    assert [layer.layer for layer in trace.mixture] == ([0, 2] if "mom" in name else [])
    assert (trace.token_memory is None) == ("mom" in name)
    found = {(part.kind, part.block, part.index) for part in trace.knock_outs.parts}
    of_mixture = {("memory", 0, memory) for memory in range(4)} | {("block", 0, None), ("block", 2, None)}
    expected = {
        "mom": of_mixture,
        "lm2-on-mom": of_mixture | {("slot", None, slot) for slot in range(5)} | {("block", 1, None)},
        "rmt": {("memory", None, token) for token in range(3)},
        "armt": {("block", block, None) for block in range(3)},
    }[name]
    assert found == expected | {("all", None, None)}


def test_without_its_memories_a_mixture_reads_every_stretch_by_itself() -> None:
    model, ids = model_of("mom"), tokens(1, 40)[0]
    trace = recorded("mom", ids)
    assert trace.text.segments.tolist() == [0, 16, 32, 40]
    assert any("every stretch of 16 tokens" in note for note in trace.notes)
    known, unknown = trace.predictions.with_memory, trace.predictions.without_memory
    np.testing.assert_array_equal(known[1:17], unknown[1:17])  # the first stretch has nothing before it
    everything = next(part for part in mixture_parts(model) if part.kind == "all")
    cache = MemoryCache()
    with torch.no_grad(), everything.removed():
        logits = torch.cat([model(input_ids=piece[None], past_key_values=cache).logits[0] for piece in ids.split(16)])
    expected = logits.log_softmax(dim=-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    np.testing.assert_allclose(unknown[1:], expected, atol=1e-6)
    assert abs(known[17:] - unknown[17:]).max() > 1e-3


def test_a_mixture_is_asked_from_the_question_on_and_its_answer_split_before_the_target() -> None:
    model, ids, start = model_of("mom"), tokens(1, 40)[0], 21
    trace = recorded("mom", ids, target=[9], question_start=start)
    assert any(f"the last {40 + 1 - start} tokens" in note for note in trace.notes)
    assert 39 in {contribution.reader for contribution in trace.mixture[0].contributions}
    everything = next(part for part in mixture_parts(model) if part.kind == "all")
    cache = MemoryCache()
    with torch.no_grad():
        model(input_ids=ids[None, :start], past_key_values=cache)
        with everything.removed():
            logits = model(input_ids=ids[None, start:], past_key_values=cache).logits[0, -1]
    (found,) = (part for part in trace.knock_outs.parts if part.kind == "all")
    assert found.log_probability == pytest.approx(float(logits.log_softmax(dim=-1)[9]), abs=1e-6)


def test_a_prompt_is_read_after_what_a_memory_holds_and_the_models_own_answer_measured() -> None:
    model, ids, cut = model_of("lm2-depth"), tokens(1, LENGTH)[0], SEGMENT + 3
    cache = MemoryCache()
    with torch.no_grad():
        model(input_ids=ids[None, :cut], past_key_values=cache)
        given = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        answer = model.generate(ids[None, cut:], memory=cache.state, **given)[0, LENGTH - cut :]
    prompt = " ".join(f"w{index}" for index in ids[cut:].tolist())
    read = memory_source(cache.state, "a.memory", prompt, word_tokenizer())
    trace = record(model, word_tokenizer(), **vars(read))
    whole = recorded("lm2-depth", torch.cat([ids, answer]))
    assert trace.source == Source("memory", "a.memory", question=prompt)
    assert trace.knock_outs.target == " ".join(f"w{index}" for index in answer.tolist())
    assert any("the model's own" in note for note in trace.notes)
    assert any(f"the last {LENGTH - cut + 16} tokens" in note for note in trace.notes)
    np.testing.assert_allclose(trace.predictions.with_memory[1:], whole.predictions.with_memory[cut + 1 :], atol=1e-6)
    np.testing.assert_allclose(trace.bank[2].read, whole.bank[2].read[cut:], atol=1e-3)
    assert trace.bank[0].word_segments[0] == -1


@pytest.mark.parametrize("name", MODELS)
def test_tokens_that_wait_in_a_memory_file_are_read_first_and_shown(name: str, tmp_path: Path) -> None:
    model, ids = model_of(name), tokens(1, 3 * SEGMENT)[0]
    path = model.memorize(ids[None, :-4]).save(tmp_path / "a.memory.safetensors")
    state = MemoryState.load(path)
    waiting = len(state.pending[0])
    read = memory_source(state, "a", " ".join(f"w{index}" for index in ids[-4:].tolist()), word_tokenizer())
    trace = record(model, word_tokenizer(), **vars(read))
    assert waiting == (17 if name in ("mom", "lm2-layer") else SEGMENT - 4)
    shown = "".join(trace.text.pieces).split()[: waiting + 4]
    assert shown == [f"w{index}" for index in ids[-waiting - 4 :].tolist()]
    assert any(f"the first {waiting} tokens are the memory's" in note for note in trace.notes)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
    expected = logits[-waiting - 4 : -1].gather(1, ids[-waiting - 3 :, None])[:, 0]
    np.testing.assert_allclose(trace.predictions.with_memory[1 : waiting + 4], expected.numpy(), atol=1e-5)


def test_an_answer_ends_where_the_model_ends_it() -> None:
    model, ids = model_of("rmt"), tokens(1, 5)[0].tolist()
    free = greedy_answer(model, ids, None, None, 6)
    assert len(free) == 6
    assert greedy_answer(model, ids, None, free[0], 6) == []
    assert greedy_answer(model, ids, None, free[3], 6) == free[: free.index(free[3])]


def test_what_cannot_be_recorded_is_refused_in_one_line() -> None:
    tokenizer, ids = word_tokenizer(), [3, 4, 5]
    plain = AutoModelForCausalLM.from_config(llama_config())
    window = lm2(llama_config(), memory_layers=[], attention_span=9)
    two_rows = model_of("lm2-depth").initial_state(2)
    for expected, call in (
        (ConfigError, lambda: record(plain, tokenizer, ids, TEXT)),
        (ConfigError, lambda: record(window, tokenizer, ids, TEXT)),
        (ShapeError, lambda: record(model_of("lm2-depth"), tokenizer, [], TEXT)),
        (ShapeError, lambda: record(model_of("lm2-depth"), tokenizer, [3, 50], TEXT)),
        (ShapeError, lambda: record(model_of("lm2-depth"), tokenizer, [3] * 513, TEXT)),
        (StateError, lambda: record(model_of("lm2-depth"), tokenizer, ids, TEXT, state=two_rows)),
        (StateError, lambda: record(model_of("lm2-depth"), tokenizer, ids, TEXT, state=rmt(llama_config())
                                    .initial_state(1))),
        (DataError, lambda: text_source("", "empty.txt", tokenizer)),
        (ConfigError, lambda: babilong_source("qa2-4k", tokenizer)),
    ):  # fmt: skip
        with pytest.raises(expected) as refused:
            call()
        assert isinstance(refused.value, MnemonError)
        assert "\n" not in str(refused.value)


def test_models_without_segments_are_read_in_stretches_that_fit_the_text() -> None:
    mom = lm2_on_mom().base
    assert [segment_length(mom, length) for length in (10, 600, 4095, 4096, 10**6)] == [16, 32, 128, 256, 256]
    assert segment_length(model_of("lm2-depth"), 10**6) == SEGMENT


def test_columns_have_the_text_of_their_tokens_with_its_blanks() -> None:
    model, tokenizer = shipped()
    text = "Mary moved to the bathroom. The 7 cows, naïve as ever, saw “it” — twice!"
    ids = tokenizer(text)["input_ids"]
    for most in (10**6, 20, 5):
        pieces = column_texts(plan_reading(model, ids, most, None), tokenizer)
        assert "".join(pieces) == tokenizer.decode(ids) == text
    blanks = word_tokenizer()
    reading = plan_reading(model_of("lm2-depth"), [5, 6, 7], 10**6, None)
    assert column_texts(reading, blanks) == ("w5", " w6", " w7")


def test_a_sample_is_asked_where_its_question_begins() -> None:
    _, tokenizer = shipped()
    (sample,) = generate("qa1", "1k", 1, tokenizer, seed=3)
    read = sample_source(sample, "qa1:1k:3", tokenizer)
    assert read == babilong_source("qa1:1k:3", tokenizer)
    assert tokenizer.decode(read.ids[read.question_start :]).strip() == f"Question: {sample.question}\nAnswer:"
    assert tokenizer.decode(read.target).strip() == sample.target
    assert read.source == Source("babilong", "qa1:1k:3", sample.question, sample.target)


def test_the_shipped_model_answers_from_its_memory(tmp_path: Path) -> None:
    model, tokenizer = shipped()
    lost = []
    for seed in range(2):
        read = babilong_source(f"qa1:1k:{seed}", tokenizer)
        trace = record(model, tokenizer, read.ids, read.source, read.target, read.question_start)
        (everything,) = (part for part in trace.knock_outs.parts if part.kind == "all")
        lost.append(trace.knock_outs.log_probability - everything.log_probability)
    assert all(difference > 0.5 for difference in lost)
    assert trace.knock_outs.target == read.source.answer
    assert len(trace.bank[0].slots) == 16
    path = save_trace(tmp_path / "a.trace.safetensors", trace)
    assert path.stat().st_size < 1_000_000
