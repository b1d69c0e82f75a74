"""Recording linear memories: against what the layers return, whatever the cuts, without changing a bit."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from lm2_cases import llama_config, tokens
from mom_cases import MIXED, SHALLOW, case, lm2_on_mom, mom
from torch import Tensor

from mnemon.inspection import record_mixture
from mnemon.inspection.emptied import memory_mixers
from mnemon.inspection.reading import Reading, plan_reading, read_segments
from mnemon.inspection.record_mixture import MixtureRecorder, mixture_parts
from mnemon.inspection.trace import MixtureLayer, group_columns
from mnemon.layers.mixture_of_memories import MixtureOfMemories
from mnemon.models.memory_model import MemoryModel
from mnemon.models.state import MemoryCache, MemoryState
from mnemon.ops import list_rules
from mnemon.ops.state import leaves

LENGTH = 60
MODELS = ["mom", "mom-mamba2", "mom-gsa", "mom-retnet", "mom-ttt", "memory", "mistral-both", "lfm2-mom", "lm2-on-mom"]
every_model = pytest.mark.parametrize("name", MODELS)


class Spelling:
    """A tokenizer whose words are the ids."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" w{token}" for token in ids)


def cut(ids: Tensor, lengths: list[int], most_columns: int = 1000) -> Reading:
    return Reading(ids[0].numpy(), *group_columns(lengths, most_columns), complete=False)


def record(
    model: MemoryModel, reading: Reading, state: MemoryState | None = None, **options: Any
) -> tuple[tuple[MixtureLayer, ...], Tensor, MixtureRecorder]:
    """Return what was recorded, the logits of the reading, and the recorder."""
    if "readers" in options:
        options["more_readers"] = 0
    recorder = MixtureRecorder(model, Spelling(), reading, state, **options)
    logits = [logits for _, logits, _ in read_segments(model, reading, [recorder], state)]
    return recorder.layers(), torch.cat(logits), recorder


@torch.no_grad()
def layer_calls(model: MemoryModel, ids: Tensor) -> list[tuple[Any, list[Any]]]:
    """Read all at once and return, for every block with memories, its mixer and what its calls returned."""
    found = [(mixer, []) for mixer in memory_mixers(model)]
    handles = [
        mixer.layer.register_forward_hook(lambda _, args, output, calls=calls: calls.append(output))
        for mixer, calls in found
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


def state_after(model: MemoryModel, ids: Tensor, cache: MemoryCache | None = None) -> MemoryState:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).past_key_values.state


@every_model
def test_weights_entropy_load_and_norms_are_those_of_the_layers(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    layers, _, _ = record(model, plan_reading(model, ids[0].tolist(), 1000, None), readers=[])
    found = layer_calls(model, ids)
    assert [layer.layer for layer in layers] == [mixer.index for mixer, _ in found]
    for layer, (mixer, outputs) in zip(layers, found, strict=True):
        assert layer.rule == mixer.layer.rule.name
        np.testing.assert_allclose(layer.weights.sum(axis=1), 1, atol=1e-6)
        assert layer.load.sum() == pytest.approx(1)
        state = outputs[-1][1]
        if not isinstance(mixer.layer, MixtureOfMemories):
            assert (layer.weights == 1).all()
            assert layer.weights.shape == (LENGTH, 1)
            assert not layer.entropy.any()
            norms = [sum(x.square().sum() for x in leaves(state.memory) if x.is_floating_point()).sqrt()]
        else:
            routings = [routing for *_, routing in outputs]
            p = torch.cat([routing.probabilities[0] for routing in routings])
            for token in range(LENGTH):
                best, memories = p[token].topk(mixer.layer.router.top_k)
                expected = np.zeros(mixer.layer.num_memories)
                expected[memories.numpy()] = (best / best.sum()).numpy()
                np.testing.assert_allclose(layer.weights[token], expected, atol=1e-5)
            np.testing.assert_allclose(layer.entropy, -(p * p.log()).sum(-1).numpy(), atol=1e-5)
            norms = [
                sum(x[0, memory].square().sum() for x in leaves(state.memories.memory) if x.is_floating_point()).sqrt()
                for memory in range(mixer.layer.total)
            ]
        np.testing.assert_allclose(layer.state_norm[-1], norms, rtol=1e-4)


@pytest.mark.parametrize("name", ["mom", "mom-mamba2", "lm2-on-mom"])
def test_loads_are_those_that_the_model_reports(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    layers, _, recorder = record(model, plan_reading(model, ids[0].tolist(), 1000, None), readers=[])
    with torch.no_grad():
        loads = model(ids, output_routing=True).loads.numpy()
    routed = [layer.load for layer in layers if len(layer.load) > 1]
    np.testing.assert_allclose(routed, loads, atol=1e-6)
    assert any("found no room" in note for note in recorder.notes) == (name == "mom-mamba2")


@every_model
def test_recording_changes_no_bit(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    reading = plan_reading(model, ids[0].tolist(), 20, None)
    expected = torch.cat([logits for _, logits, _ in read_segments(model, reading, [])])
    before = {n: p.clone() for n, p in model.named_parameters()}
    _, logits, _ = record(model, reading)
    assert torch.equal(logits, expected)
    assert torch.equal(torch.cat([logits for _, logits, _ in read_segments(model, reading, [])]), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(mixer.layer._forward_hooks for mixer in memory_mixers(model))


@pytest.mark.parametrize("name", ["mom", "mom-mamba2", "memory", "mistral-both"])
def test_pieces_show_what_one_call_shows(name: str) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    readers = [20, 41, LENGTH - 1]
    whole, _, _ = record(model, cut(ids, [LENGTH]), readers=readers)
    pieces, _, _ = record(model, cut(ids, [7, 1, 30, 22]), readers=readers)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-5)
        np.testing.assert_allclose(one.entropy, other.entropy, atol=1e-5)
        np.testing.assert_allclose(one.load, other.load, atol=1e-6)
        np.testing.assert_allclose(one.state_norm[-1], other.state_norm[-1], rtol=1e-4)
        assert one.special_words == other.special_words
        assert [(c.reader, c.memory) for c in one.contributions] == [(c.reader, c.memory) for c in other.contributions]
        for a, b in zip(one.contributions, other.contributions, strict=True):
            np.testing.assert_allclose(a.shares, b.shares, atol=1e-4)


def test_columns_are_means_of_their_tokens_and_contributions_sums() -> None:
    model, ids = case("mom"), tokens(1, LENGTH)
    fine, _, _ = record(model, cut(ids, [25, 35]))
    coarse, _, _ = record(model, cut(ids, [25, 35], most_columns=10))
    starts = cut(ids, [25, 35], most_columns=10).starts
    for one, other in zip(fine, coarse, strict=True):
        for column, (first, end) in enumerate(itertools.pairwise(starts)):
            np.testing.assert_allclose(other.weights[column], one.weights[first:end].mean(axis=0), atol=1e-6)
            np.testing.assert_allclose(other.entropy[column], one.entropy[first:end].mean(), atol=1e-6)
        for a, b in zip(one.contributions, other.contributions, strict=True):
            np.testing.assert_allclose(b.shares, np.add.reduceat(a.shares, starts[:-1]), atol=1e-5)


@pytest.mark.parametrize("rule", list_rules())
def test_contributions_of_every_rule_add_up_to_one_or_are_said_to_be_missing(rule: str) -> None:
    model, ids = mom(SHALLOW, rule=rule, num_slots=5), tokens(1, 40)
    earlier = state_after(model, tokens(1, 9, seed=3))
    is_linear = bool(model.memory_layers[0].rule.linear_in_values(**model.memory_layers[0].settings))
    for state in (None, earlier):
        layers, _, recorder = record(model, cut(ids, [16, 16, 8]), state)
        assert any("not linear" in note for note in recorder.notes) == (not is_linear)
        for layer in layers:
            assert bool(layer.contributions) == is_linear
            for contribution in layer.contributions:
                assert contribution.shares.sum() + contribution.before == pytest.approx(1, abs=1e-4)
                if state is None or contribution.memory == 3:  # earlier tokens need not have gone to the others
                    assert (contribution.before != 0) == (state is not None)
        if is_linear:
            assert {(c.reader, c.memory) for c in layers[0].contributions} >= {(39, 3)}  # the shared memory


@pytest.mark.parametrize("name", ["mom", "mistral-both", "lm2-on-mom"])
def test_the_way_back_is_the_same_from_few_or_many_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = case(name), tokens(1, LENGTH)
    reading = plan_reading(model, ids[0].tolist(), 1000, None)
    expected, _, _ = record(model, reading, readers=[11, 50])
    monkeypatch.setattr(record_mixture, "_STRETCH", 14)
    for kept in (1, 2, 100):
        monkeypatch.setattr(record_mixture, "_STATES_KEPT", kept)
        layers, _, _ = record(model, reading, readers=[11, 50])
        for one, other in zip(expected, layers, strict=True):
            assert one.contributions
            for a, b in zip(one.contributions, other.contributions, strict=True):
                assert (a.reader, a.memory) == (b.reader, b.memory)
                np.testing.assert_allclose(a.shares, b.shares, atol=1e-5)


def test_contributions_are_of_the_last_token_and_of_those_before_a_rare_expected_one() -> None:
    model, ids = case("mom"), tokens(1, LENGTH)
    reading = plan_reading(model, ids[0].tolist(), 1000, None)
    layers, logits, recorder = record(model, reading)
    readers = sorted({c.reader for c in layers[0].contributions})
    assert readers[-1] == LENGTH - 1
    assert 2 <= len(readers) <= 4
    log_p = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    shares = torch.bincount(ids[0]).double() / LENGTH
    gain = log_p - shares[ids[0, 1:]].log()
    best = int(gain.argmax())
    assert (best in readers) == bool(gain[best] > 0)
    assert any("contributions" in note for note in recorder.notes)


def planted_routing() -> tuple[MemoryModel, int]:
    """Return a model of one block whose router sends one token, and hardly another, to memory 2."""
    word = 17
    model = mom(llama_config(num_hidden_layers=1), num_memories=3, top_k=1, conv_size=0)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.nn.functional.normalize(torch.randn_like(embedding), dim=1))
        router = memory_mixers(model)[0].layer.router.logits.weight
        router.zero_()
        router[0] = 0.2 * torch.randn_like(router[0])
        router[2] = 3 * embedding[word]
    return model, word


def test_words_of_a_planted_routing_are_found() -> None:
    model, word = planted_routing()
    ids = tokens(1, 400)
    ids[0, ::8] = word
    (layer,), _, _ = record(model, plan_reading(model, ids[0].tolist(), 50, None), readers=[])
    first = layer.special_words[2][0]
    assert first.word == f"w{word}"
    assert first.count == int((ids == word).sum())
    assert first.lift > 1.5
    assert not any(entry.word == f"w{word}" for other in layer.special_words[:2] for entry in other)


def test_lift_is_the_smoothed_share_of_a_memorys_words_over_that_of_all_words() -> None:
    model, word = planted_routing()
    ids = tokens(1, 400)
    ids[0, ::8] = word
    (layer,), _, _ = record(model, plan_reading(model, ids[0].tolist(), 50, None), readers=[])
    (_, outputs), *_ = layer_calls(model, ids)
    chosen = outputs[0][2].memories[0, :, 0]
    for memory, entries in enumerate(layer.special_words):
        assert len(entries) <= 12
        for entry in entries:
            token = int(entry.word.removeprefix("w"))
            is_word, is_there = ids[0] == token, chosen == memory
            assert entry.count == int((is_word & is_there).sum()) >= 3
            expected = float(is_word.sum() * is_there.double().mean())
            assert entry.lift == pytest.approx((entry.count + 2) / (expected + 2))
            assert entry.lift > 1


def test_a_memory_without_room_takes_no_words() -> None:
    model, word = planted_routing()
    memory_mixers(model)[0].layer.router.capacity = 0.05
    ids = tokens(1, 200)
    ids[0, ::4] = word
    (layer,), _, recorder = record(model, plan_reading(model, ids[0].tolist(), 50, None), readers=[])
    counts = {entry.word: entry.count for entry in layer.special_words[2]}
    assert counts.get(f"w{word}", 0) <= 10
    assert any("found no room" in note for note in recorder.notes)


# Knocked out


@torch.no_grad()
def logits_without(model: MemoryModel, name: str, ids: Tensor, state: MemoryState | None) -> tuple[Tensor, MemoryState]:
    (part,) = [part for part in mixture_parts(model) if part.name == name]
    cache = MemoryCache(state)
    with part.removed():
        logits = model(ids, past_key_values=cache).logits
    assert not any(mixer.layer._forward_hooks for mixer in memory_mixers(model))
    return logits, cache.state


def test_the_parts_are_every_memory_every_block_and_all() -> None:
    names = [(part.kind, part.name, part.block, part.index) for part in mixture_parts(case("mom-sliding"))]
    assert names == [
        ("memory", "memory 0 of block 0", 0, 0),
        ("memory", "memory 1 of block 0", 0, 1),
        ("memory", "memory 2 of block 0", 0, 2),
        ("memory", "shared memory of block 0", 0, 3),
        ("block", "memories of block 0", 0, None),
        ("block", "memories of block 2", 2, None),
        ("all", "all linear memories", None, None),
    ]


@pytest.mark.parametrize("rule", [rule for rule in list_rules() if rule != "ttt"])  # which counts mini-batches
@pytest.mark.parametrize("single", [False, True])
def test_without_all_memories_a_text_is_read_as_if_nothing_came_before(rule: str, single: bool) -> None:
    kind = {"layer_types": ["memory"] * 2} if single else {}
    model = mom(SHALLOW, rule=rule, conv_size=0, num_slots=5, **kind)
    ids = tokens(1, 30)
    state = state_after(model, ids[:, :20])
    logits, _ = logits_without(model, "all linear memories", ids[:, 20:], state)
    with torch.no_grad():
        alone, whole = model(ids[:, 20:]).logits, model(ids).logits[:, 20:]
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-6)
    assert (logits - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mom", "mom-mamba2", "mom-ttt", "memory", "lm2-on-mom"])
def test_knocking_out_a_block_changes_its_answer_and_not_its_state(name: str) -> None:
    model, ids = case(name), tokens(1, 40)
    state = state_after(model, ids[:, :28])
    expected = state_after(model, ids[:, 28:], MemoryCache(state))
    block = memory_mixers(model)[0].index
    logits, after = logits_without(model, f"memories of block {block}", ids[:, 28:], state)
    with torch.no_grad():
        whole = model(ids[:, 28:], past_key_values=MemoryCache(state)).logits
    assert (logits - whole).abs().max() > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(after.decoder.base[block], expected.decoder.base[block], strict=True))
    nothing, _ = logits_without(model, f"memories of block {block}", ids[:, :5], None)
    with torch.no_grad():
        assert torch.equal(nothing, model(ids[:, :5]).logits)


def test_one_memory_is_emptied_and_the_others_answer_as_before() -> None:
    model, ids = mom(SHALLOW, rule="gla", conv_size=0, top_k=1), tokens(1, 40)
    state = state_after(model, ids[:, :28])
    mixer = memory_mixers(model)[0]
    mixed: list[Tensor] = []
    output = mixer.layer.output
    mixer.layer.output = lambda o, x: mixed.append(o) or output(o, x)
    try:
        with torch.no_grad():
            model(ids[:, 28:], past_key_values=MemoryCache(state))
        whole = mixed.pop(0)
        for memory in range(3):
            mixed.clear()
            logits_without(model, f"memory {memory} of block 0", ids[:, 28:], state)
            changed = (mixed[1] != whole)[0].flatten(1).any(dim=1)
            (_, outputs), *_ = layer_calls(model, ids)
            goes_there = outputs[0][2].memories[0, 28:, 0] == memory
            assert torch.equal(changed, goes_there)
    finally:
        del mixer.layer.output


def test_a_hybrids_attention_is_no_part() -> None:
    blocks = {part.block for part in mixture_parts(mom(**MIXED))}
    assert blocks == {0, 2, None}


def test_layers_can_be_asked_for_in_inference_mode() -> None:
    model, ids = case("mom"), tokens(1, 40)
    reading = plan_reading(model, ids[0].tolist(), 1000, None)
    expected, _, _ = record(model, reading, readers=[39])
    with torch.inference_mode():
        layers, _, _ = record(model, reading, readers=[39])
    for one, other in zip(expected, layers, strict=True):
        for a, b in zip(one.contributions, other.contributions, strict=True):
            np.testing.assert_allclose(a.shares, b.shares, atol=1e-6)


def test_a_record_is_small_and_in_float32() -> None:
    model, ids = lm2_on_mom(), tokens(1, LENGTH)
    layers, _, _ = record(model, plan_reading(model, ids[0].tolist(), 10, None))
    for layer in layers:
        arrays = [value for value in dataclasses.asdict(layer).values() if isinstance(value, np.ndarray)]
        assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
