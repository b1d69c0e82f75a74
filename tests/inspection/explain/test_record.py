"""Recorded activations are what the model computes; recording changes nothing."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from lm2_cases import SEGMENT, llama_config, lm2, tokens
from mom_cases import lm2_on_mom, mom

from mnemon.errors import ConfigError, ShapeError
from mnemon.inspection.explain.activations import most_varied
from mnemon.inspection.explain.patterns import PatternExplainer
from mnemon.inspection.explain.record import explain_memory, record_activations, units_of
from mnemon.layers.memory_diagnostics import MemoryDiagnostics
from mnemon.models.state import MemoryCache

HALF = {"rtol": 1e-3, "atol": 1e-6}  # what float16 keeps


class Letters:
    """A tokenizer of one letter per token."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + index % 26) for index in ids)


class Weights(MemoryDiagnostics):
    """Keeps the read weights that the model itself computes for its diagnostics."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, list[torch.Tensor]] = defaultdict(list)

    def add_read(self, block: int, weights: torch.Tensor, *others: Any) -> None:
        self.weights[block].append(weights)


@pytest.mark.parametrize("options", [{"flow": "depth"}, {"flow": "layer", "read_top_k": 2, "memory_layers": [0, 2]}])
def test_reads_are_those_of_the_models_own_diagnostics(options: dict[str, Any]) -> None:
    model = lm2(llama_config(), **options)
    ids = tokens(1, 3 * SEGMENT + 4)
    found = record_activations(model, Letters(), ids[0].tolist())
    model._collector = diagnostics = Weights()
    with torch.no_grad():
        model(ids)
    model._collector = None
    assert found.kind == "read"
    assert {unit.block for unit in found.units} == set(diagnostics.weights)
    for block, weights in diagnostics.weights.items():
        columns = [column for column, unit in enumerate(found.units) if unit.block == block]
        expected = torch.cat([part[0].mean(dim=0) for part in weights])
        np.testing.assert_allclose(found.values[:, columns], expected, **HALF)
    assert len(found.pieces) == found.num_tokens == ids.shape[1]
    assert "".join(found.pieces) == Letters().decode(ids[0].tolist())


def test_what_a_slot_is_written_from_adds_up_to_one_in_every_segment() -> None:
    model = lm2(llama_config(), flow="layer")
    found = record_activations(model, Letters(), tokens(1, 2 * SEGMENT + 3)[0].tolist(), kind="write")
    sums = np.add.reduceat(found.values.astype(float), [0, SEGMENT, 2 * SEGMENT], axis=0)
    np.testing.assert_allclose(sums, 1, atol=5e-3)
    assert found.values.std(axis=0).min() > 0


def test_routes_are_the_routers_weights() -> None:
    model = mom(num_memories=3, top_k=2)
    ids = tokens(1, 41)
    found = record_activations(model, Letters(), ids[0].tolist())
    assert (found.kind, len(found.units)) == ("route", 9)
    seen = []
    layer: Any = model.memory_layers[1]
    handle = layer.router.register_forward_hook(lambda module, inputs, routing: seen.append(routing))
    with torch.no_grad():
        model(ids)
    handle.remove()
    expected = np.zeros((41, 3))
    np.put_along_axis(expected, seen[0].memories[0].numpy(), seen[0].weights[0].numpy(), axis=1)
    columns = [column for column, unit in enumerate(found.units) if unit.block == 1]
    np.testing.assert_allclose(found.values[:, columns], expected, **HALF)


def test_a_memory_without_room_gets_nothing() -> None:
    model = mom(num_memories=3, top_k=2, capacity=0.5)
    found = record_activations(model, Letters(), tokens(1, 41)[0].tolist())
    sums = found.values.astype(float).reshape(41, 3, 3).sum(axis=2)
    assert sums.max() <= 1.001
    assert sums.min() < 0.9


def test_a_bank_on_mixtures_has_both_kinds_of_units() -> None:
    model = lm2_on_mom()
    ids = tokens(1, 2 * SEGMENT)[0].tolist()
    assert record_activations(model, Letters(), ids).kind == "read"
    assert {unit.name for unit in units_of(model, "route")} == {f"block 0, memory {index}" for index in range(3)}
    assert record_activations(model, Letters(), ids, kind="route").values.any()


def test_recording_changes_nothing() -> None:
    model = lm2(llama_config()).train()
    ids = tokens(1, 2 * SEGMENT)
    with torch.no_grad():
        before = model.eval()(ids).logits
        model.train()
        record_activations(model, Letters(), ids[0].tolist())
        assert model.training
        assert torch.equal(model.eval()(ids).logits, before)
    assert not any("read" in vars(bank) or "gather" in vars(bank) for bank in model.banks)


def test_some_units_are_recorded_as_they_are_among_all() -> None:
    model = lm2(llama_config())
    ids = tokens(1, 20)[0].tolist()
    every = record_activations(model, Letters(), ids)
    chosen = [every.units[7], every.units[2]]
    some = record_activations(model, Letters(), ids, units=chosen)
    np.testing.assert_array_equal(some.values, every.values[:, [7, 2]])
    assert some.units == tuple(chosen)


def test_a_text_goes_on_from_a_state() -> None:
    model = lm2(llama_config())
    ids = tokens(1, 3 * SEGMENT)
    whole = record_activations(model, Letters(), ids[0].tolist())
    cut = SEGMENT + 3
    cache = MemoryCache()
    with torch.no_grad():
        model(ids[:, :cut], past_key_values=cache)
    rest = record_activations(model, Letters(), ids[0, cut:].tolist(), state=cache.state)
    np.testing.assert_allclose(rest.values, whole.values[cut:], rtol=2e-3, atol=1e-6)


def test_the_units_that_vary_most_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm2(llama_config())
    ids = tokens(1, 60)[0].tolist()
    every = record_activations(model, Letters(), ids)
    names = [every.units[column].name for column in most_varied(every, 3)]
    once = explain_memory(model, Letters(), ids, PatternExplainer(), 3)
    assert [explanation.unit for explanation in once] == names
    # Where all units are too many to keep, a first reading finds the same ones.
    monkeypatch.setattr("mnemon.inspection.explain.record._MOST_BYTES", 100)
    monkeypatch.setattr("mnemon.inspection.explain.record._COMPARED", 0)
    twice = explain_memory(model, Letters(), ids, PatternExplainer(), 3)
    assert [explanation.unit for explanation in twice] == names
    with pytest.raises(ConfigError, match="name the units to record"):
        record_activations(model, Letters(), ids)


def test_what_cannot_be_recorded_is_refused() -> None:
    model = lm2(llama_config())
    with pytest.raises(
        ConfigError, match=r"LM2ForCausalLM has no units of kind 'route' to explain: it has read, write"
    ):
        record_activations(model, Letters(), [3, 4], kind="route")
    with pytest.raises(ConfigError, match="unknown kind of activation 'thought'"):
        units_of(model, "thought")
    with pytest.raises(ConfigError, match="neither slots nor a router"):
        units_of(mom(layer_types=["memory"] * 3))
    with pytest.raises(ConfigError, match="block 0, memory 0 is no unit of this model"):
        record_activations(model, Letters(), [3, 4], units=units_of(mom())[:1])
    with pytest.raises(ShapeError, match="nothing to read"):
        record_activations(model, Letters(), [])
