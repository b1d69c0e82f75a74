import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnemon.errors import ConfigError, DataError
from mnemon.evaluation.babilong import evaluate_babilong
from mnemon.evaluation.results import result_from_json, to_json
from mnemon.evaluation.samples import FixedSamples, GeneratedSamples, check_lengths, check_tasks

TASKS, LENGTHS = ("qa1", "qa6"), ("0k", "1k")


@pytest.fixture
def options(tokenizer: Any, fake_source: Any) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "tasks": TASKS,
        "lengths": LENGTHS,
        "num_samples": 5,
        "samples": fake_source,
        "max_new_tokens": 6,
    }


def test_an_oracle_is_right_everywhere_by_both_rules(
    make_oracle: Callable[..., Any], options: dict[str, Any], fake_source: Any
) -> None:
    result = evaluate_babilong(make_oracle(fake_source, TASKS, LENGTHS), **options)
    assert [(cell.length, cell.task) for cell in result.cells] == [(a, b) for a in LENGTHS for b in TASKS]
    for cell in result.cells:
        assert cell.accuracy("exact").mean == cell.accuracy("official").mean == 1.0
        assert cell.new_tokens >= 5
    first = next(result.predictions())
    assert (first.sample_id, first.output.strip()) == ("qa1-0k-0000", first.target)


def test_the_order_of_names_does_not_matter(plain: Any, options: dict[str, Any]) -> None:
    one = evaluate_babilong(plain, **options)
    other = evaluate_babilong(plain, **options | {"tasks": TASKS[::-1] + TASKS, "lengths": LENGTHS[::-1]})
    assert list(one.predictions()) == list(other.predictions())


def test_a_result_survives_json(plain: Any, options: dict[str, Any]) -> None:
    result = evaluate_babilong(plain, label="a|b <c>", training={"tokens": 5}, **options)
    assert result_from_json(to_json(result)) == result


def test_json_with_a_wrong_field_is_a_data_error(plain: Any, options: dict[str, Any]) -> None:
    value = json.loads(to_json(evaluate_babilong(plain, **options)))
    value["cells"][0]["predictions"][0]["colour"] = "red"
    with pytest.raises(DataError, match="colour"):
        result_from_json(json.dumps(value))
    del value["cells"][0]["predictions"][0]["colour"], value["settings"]["seed"]
    with pytest.raises(DataError, match="seed"):
        result_from_json(json.dumps(value))
    with pytest.raises(DataError, match="line 1"):
        result_from_json("{")


def test_a_resumed_evaluation_gives_the_same_predictions_and_asks_only_what_is_missing(
    make_oracle: Callable[..., Any], options: dict[str, Any], fake_source: Any, tmp_path: Path
) -> None:
    oracle = make_oracle(fake_source, TASKS, LENGTHS)
    options["batch_size"] = 5  # one cell per call
    whole = evaluate_babilong(oracle, **options)

    class Interruption(Exception):
        pass

    def interrupt(task: str, length: str, count: int) -> None:
        if (task, length) == ("qa1", "1k"):
            raise Interruption

    with pytest.raises(Interruption):
        evaluate_babilong(oracle, cells_folder=tmp_path, progress=interrupt, **options)
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["qa1-0k.json", "qa6-0k.json"]
    oracle.calls.clear()
    done: list[tuple[str, str, int]] = []
    resumed = evaluate_babilong(oracle, cells_folder=tmp_path, progress=lambda *news: done.append(news), **options)
    assert sum(call["batch"] for call in oracle.calls) == 2 * 5
    assert list(resumed.predictions()) == list(whole.predictions())
    assert sum(count for _, _, count in done) == 4 * 5


def test_tasks_that_are_answered_together_are_answered_as_each_alone(
    lm2: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    usual = type(lm2).generate

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        batches.append(len(named["input_ids"]))
        return usual(self, *arguments, **named)

    monkeypatch.setattr(type(lm2), "generate", counted)
    together = evaluate_babilong(lm2, **options)
    assert batches == [10, 10]  # both tasks of a length in one call
    alone = evaluate_babilong(lm2, batch_size=5, **options)
    assert batches[2:] == [5, 5, 5, 5]
    assert list(together.predictions()) == list(alone.predictions())
    for one, other in zip(together.cells, alone.cells, strict=True):
        assert (one.task, one.length) == (other.task, other.length)
        assert (one.prompt_tokens, one.new_tokens) == (other.prompt_tokens, other.new_tokens)
        assert one.seconds > 0


def test_stored_cells_of_other_settings_or_weights_are_refused(
    plain: Any, lm2: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    evaluate_babilong(plain, cells_folder=tmp_path, **options)
    evaluate_babilong(plain, cells_folder=tmp_path, **options | {"tasks": ("qa1",)})
    with pytest.raises(ConfigError, match="seed"):
        evaluate_babilong(plain, cells_folder=tmp_path, seed=3, **options)
    with pytest.raises(ConfigError, match="weights"):
        evaluate_babilong(lm2, cells_folder=tmp_path, **options)


def test_a_damaged_cell_is_named(plain: Any, options: dict[str, Any], tmp_path: Path) -> None:
    evaluate_babilong(plain, cells_folder=tmp_path, **options)
    path = next(tmp_path.rglob("qa6-0k.json"))
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match=r"qa6-0k\.json"):
        evaluate_babilong(plain, cells_folder=tmp_path, **options)


def test_generated_samples_have_the_asked_length_and_repeat(tokenizer: Any) -> None:
    first = GeneratedSamples(tokenizer, 3, seed=4).cell("qa1", "1k")
    again = GeneratedSamples(tokenizer, 3, seed=4).cell("qa1", "1k")
    other = GeneratedSamples(tokenizer, 3, seed=5).cell("qa1", "1k")
    assert [s.input for s in first] == [s.input for s in again] != [s.input for s in other]
    assert {len(tokenizer(s.input, add_special_tokens=False)["input_ids"]) for s in first} == {1000}
    reserved = GeneratedSamples(tokenizer, 1, reserve_tokens=300).cell("qa1", "1k")[0]
    assert len(tokenizer(reserved.input, add_special_tokens=False)["input_ids"]) == 700
    assert GeneratedSamples(tokenizer, 1, reserve_tokens=300).cell("qa1", "0k")


def test_the_official_layout_is_scored_by_the_official_rule(plain: Any, options: dict[str, Any]) -> None:
    short = evaluate_babilong(plain, **options)
    official = evaluate_babilong(plain, layout="official", **options)
    assert (short.settings.rule, official.settings.rule) == ("exact", "official")
    assert next(short.predictions()).sample_sha256 == next(official.predictions()).sample_sha256
    assert next(short.predictions()).prompt_sha256 != next(official.predictions()).prompt_sha256


def test_unknown_names_are_refused_with_a_suggestion(plain: Any, options: dict[str, Any], fake_source: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean 'qa1'"):
        check_tasks(["Qa1"])
    with pytest.raises(ConfigError, match="no task"):
        check_tasks([])
    with pytest.raises(ConfigError, match="4q"):
        check_lengths(["4q"])
    with pytest.raises(ConfigError, match="num_samples"):
        evaluate_babilong(plain, **options | {"num_samples": 0})
    with pytest.raises(ConfigError, match="layout"):
        evaluate_babilong(plain, layout="long", **options)
    with pytest.raises(ConfigError, match="no samples for qa2"):
        FixedSamples({("qa1", "0k"): fake_source.cell("qa1", "0k")}).cell("qa2", "0k")


def test_some_lengths_may_have_fewer_samples(
    plain: Any, options: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    result = evaluate_babilong(plain, **options, samples_at={"1k": 2}, cells_folder=tmp_path)
    assert [len(cell.predictions) for cell in result.cells] == [5, 5, 2, 2]
    assert result_from_json(to_json(result)) == result
    with pytest.raises(ConfigError, match="made with num_samples=2, this run has 3"):
        evaluate_babilong(plain, **options, samples_at={"1k": 3}, cells_folder=tmp_path)
    with pytest.raises(ConfigError, match="num_samples must be at least 1, got 0"):
        evaluate_babilong(plain, **options, samples_at={"1k": 0})
    source = GeneratedSamples(tokenizer, 3, samples_at={"1k": 2})
    assert len(source.cell("qa1", "0k")) == 3
    assert len(source.cell("qa1", "1k")) == 2
