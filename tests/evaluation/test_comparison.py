from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mnemon.errors import ConfigError
from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.controls import ModelSpec, describe_model, role_of, weights_fingerprint, with_controls
from mnemon.evaluation.results import BabilongResult
from mnemon.models.configuration_rmt import RMTConfig
from mnemon.models.modeling_rmt import RMTForCausalLM

Invent = Callable[..., BabilongResult]


def test_results_on_different_samples_are_refused(invent: Invent) -> None:
    first, second = invent("a", lambda *_: 1.0), invent("b", lambda *_: 0.0)
    cell = second.cells[0]
    moved = replace(cell.predictions[0], sample_sha256="another sample")
    other = replace(second, cells=(replace(cell, predictions=(moved, *cell.predictions[1:])), *second.cells[1:]))
    Comparison([first, second])
    with pytest.raises(ConfigError, match="samples differ"):
        Comparison([first, other])


def test_results_with_different_settings_are_refused(invent: Invent) -> None:
    first, second = invent("a", lambda *_: 1.0), invent("b", lambda *_: 0.0, num_samples=39)
    with pytest.raises(ConfigError, match="num_samples is 40 and 39"):
        Comparison([first, second])


def test_labels_must_differ_and_there_must_be_a_result(invent: Invent) -> None:
    result = invent("a", lambda *_: 1.0)
    with pytest.raises(ConfigError, match="label"):
        Comparison([result, result])
    with pytest.raises(ConfigError, match="at least one"):
        Comparison([])


def test_a_clear_winner_is_significant_and_a_tie_has_no_best(invent: Invent) -> None:
    strong, weak = invent("strong", lambda *_: 1.0), invent("weak", lambda *_: 0.0)
    comparison = Comparison([weak, strong])
    best = comparison.best("1k")
    assert best is not None
    assert (best.label, best.significant) == ("strong", True)
    assert comparison.test("weak", "strong", "1k").result.difference.mean == -1.0
    assert Comparison([strong, replace(strong, label="twin")]).best("1k") is None
    assert Comparison([strong]).best("1k") is None


def test_a_small_lead_is_best_but_not_significant(invent: Invent) -> None:
    comparison = Comparison([invent("a", lambda *_: 0.5), invent("b", lambda *_: 0.5)])
    leaders = [comparison.best(length) for length in ("0k", "1k", "4k")]
    assert any(leader is not None for leader in leaders)
    assert not any(leader is not None and leader.significant for leader in leaders)


def test_p_values_are_corrected_for_all_tests_of_their_family(four_models: Comparison) -> None:
    per_length = [test for test in four_models.tests if test.task is None]
    per_cell = [test for test in four_models.tests if test.task is not None]
    assert (len(per_length), len(per_cell)) == (3 * 6, 2 * 3 * 6)
    assert all(test.corrected_p >= test.result.p_value for test in four_models.tests)
    smallest = min(per_length, key=lambda test: test.result.p_value)
    assert smallest.corrected_p == pytest.approx(min(1.0, smallest.result.p_value * len(per_length)))


def test_the_mean_over_tasks_counts_every_sample(invent: Invent) -> None:
    comparison = Comparison([invent("a", lambda _, task: 1.0 if task == "qa1" else 0.0)])
    assert comparison.accuracy("a", "0k").mean == 0.5
    assert comparison.accuracy("a", "0k", "qa1").mean == 1.0
    assert comparison.group_accuracy("a", ["qa6"]).mean == 0.0


def test_every_control_is_named_present_or_missing(four_models: Comparison, invent: Invent) -> None:
    assert not any("NOT" in note for note in four_models.notes())
    assert sum(note.startswith("Control") for note in four_models.notes()) == 3
    lonely = Comparison([invent("LM2", lambda *_: 1.0, role="lm2")])
    assert sum("NOT evaluated" in note for note in lonely.notes()) == 3
    assert Comparison([invent("plain", lambda *_: 1.0)]).notes() == []


def test_the_controls_of_rmt_are_itself_knocked_out_and_the_plain_model(invent: Invent) -> None:
    notes = Comparison([invent("RMT", lambda *_: 1.0, role="rmt")]).notes()
    assert sum("NOT evaluated" in note for note in notes) == 2
    assert not any("window" in note for note in notes)


def test_unequal_sizes_and_training_are_said(invent: Invent) -> None:
    small, large = invent("small", lambda *_: 1.0), invent("large", lambda *_: 1.0, parameters=103_000)
    longer = replace(large, model=replace(large.model, training={"tokens": 999, "trained_length": 2000}))
    notes = " ".join(Comparison([small, longer]).notes())
    assert "103,000 parameters" in notes
    assert "tokens seen in training: small 1,000, large 999" in notes
    assert "longest" not in notes


def test_roles_follow_from_the_models_themselves(plain: Any, lm2: Any, window: Any, tokenizer: Any) -> None:
    specs = [ModelSpec(name, model, tokenizer) for name, model in (("LM2", lm2), ("plain", plain), ("window", window))]
    rows = with_controls(specs)
    assert [row.label for row in rows] == ["LM2", "LM2 (knocked out)", "plain", "window"]
    assert [role_of(row) for row in rows] == ["lm2", "knocked_out", "plain", "window"]
    assert with_controls(rows) == rows


def test_rmt_gets_a_row_with_its_memory_knocked_out(plain: Any, tokenizer: Any) -> None:
    model = RMTForCausalLM(RMTConfig(base_config=plain.config, num_memory_tokens=2, segment_length=16))
    rows = with_controls([ModelSpec("RMT", model, tokenizer)])
    assert [row.label for row in rows] == ["RMT", "RMT (knocked out)"]
    assert [role_of(row) for row in rows] == ["rmt", "knocked_out"]


def test_a_description_counts_parameters_and_memory(plain: Any, lm2: Any, tokenizer: Any) -> None:
    described = describe_model(ModelSpec("LM2", lm2, tokenizer))
    assert described.num_parameters == sum(p.numel() for p in lm2.parameters())
    assert 0 < described.num_memory_parameters < described.num_parameters
    assert describe_model(ModelSpec("plain", plain, tokenizer)).num_memory_parameters == 0


def test_the_fingerprint_changes_with_any_weight(plain: Any) -> None:
    before = weights_fingerprint(plain)
    weight = next(plain.parameters()).data
    weight[3, 1] += 1e-3
    changed = weights_fingerprint(plain)
    weight[3, 1] -= 1e-3
    assert changed != before


def test_a_group_weighs_every_length_the_same_however_many_samples_it_has(invent: Invent) -> None:
    result = invent("a", lambda step, task: 1.0 if step == 0 else 0.0, lengths=("0k", "1k"), num_samples=40)
    cells = [cell if cell.length == "0k" else replace(cell, predictions=cell.predictions[:4]) for cell in result.cells]
    fewer = replace(result, settings=replace(result.settings, samples_at={"1k": 4}), cells=tuple(cells))
    whole, uneven = (
        Comparison([result]).group_accuracy("a", ("qa1",)),
        Comparison([fewer]).group_accuracy("a", ("qa1",)),
    )
    assert uneven.mean == whole.mean == 0.5
    assert uneven.low < whole.low < whole.high < uneven.high
