import json
from pathlib import Path
from typing import Any

import pytest

from mnemon.errors import ConfigError, DataError
from mnemon.evaluation.checkpoints import trained_layout, trained_tasks, training_facts
from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.controls import ModelSpec
from mnemon.evaluation.results import BabilongResult
from mnemon.evaluation.run import EvaluationRun, read_run, write_run
from mnemon.evaluation.suite import (
    SuiteOptions,
    evaluate_models,
    number_of_questions,
    read_published,
    read_test_stories,
)

OPTIONS = SuiteOptions(("qa1", "qa6"), ("0k",), num_samples=5, max_new_tokens=4)


def test_a_run_survives_its_folder(four_models: Comparison, tmp_path: Path) -> None:
    run = EvaluationRun(four_models.results, "mnemon eval x", {"processor": "Z80"}, "<context>")
    written = write_run(tmp_path, run)
    assert {path.name for path in written} >= {"results.json", "predictions.jsonl", "table.md", "report.html"}
    assert all(path.stat().st_size > 100 for path in written)
    assert read_run(tmp_path) == run


def test_training_seeds_of_one_label_survive_their_folder(
    four_models: Comparison, two_seeds: tuple[BabilongResult, ...], tmp_path: Path
) -> None:
    run = EvaluationRun(two_seeds, "mnemon reproduce x")
    write_run(tmp_path, run)
    assert read_run(tmp_path) == run
    assert run.comparison.labels == four_models.labels
    assert run.comparison.names[:2] == ("LM2 (seed 0)", "LM2 (seed 1)")
    assert "2 training seeds of each" in (tmp_path / "table.md").read_text()
    page = (tmp_path / "report.html").read_text()
    examples = page.split("<h2>Examples")[1].split("</section>")[0]
    assert {line.count("<th>") + line.count("<td") for line in examples.split("<tr>")[1:]} == {3 + 8}
    path = tmp_path / "predictions.jsonl"
    path.write_text(path.read_text().replace('"training_seed": 1', '"training_seed": [1]'))
    with pytest.raises(DataError, match=r"expected a whole number under 'training_seed', got \[1\]"):
        read_run(tmp_path)


def test_the_results_say_everything_without_the_predictions(four_models: Comparison, tmp_path: Path) -> None:
    write_run(tmp_path, EvaluationRun(four_models.results, "mnemon eval x"))
    value = json.loads((tmp_path / "results.json").read_text())
    cell = value["results"][0]["cells"][0]
    assert cell["num_samples"] == 40
    assert 0 <= cell["accuracy"]["exact"]["low"] <= cell["accuracy"]["exact"]["mean"] <= 1
    assert value["rule"] == "exact"
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 4 * 6 * 40


def test_a_run_with_lost_predictions_is_refused(four_models: Comparison, tmp_path: Path) -> None:
    write_run(tmp_path, EvaluationRun(four_models.results, "mnemon eval x"))
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="does not hold the answers of window"):
        read_run(tmp_path)
    path.write_text('{"model": ')
    with pytest.raises(DataError, match=r"predictions\.jsonl:1"):
        read_run(tmp_path)
    with pytest.raises(DataError, match=r"results\.json"):
        read_run(tmp_path / "nowhere")


def test_all_models_answer_the_same_samples_and_controls_are_added(
    lm2: Any, plain: Any, tokenizer: Any, fake_source: Any
) -> None:
    specs = [ModelSpec("LM2", lm2, tokenizer), ModelSpec("plain", plain, tokenizer)]
    run = evaluate_models(specs, OPTIONS, samples=fake_source, command="mnemon eval")
    assert [result.label for result in run.results] == ["LM2", "LM2 (knocked out)", "plain"]
    assert [result.model.role for result in run.results] == ["lm2", "knocked_out", "plain"]
    identities = [[p.sample_sha256 for p in result.predictions()] for result in run.results]
    assert identities[0] == identities[1] == identities[2]
    assert sum(map(len, identities)) == number_of_questions(specs, OPTIONS)
    assert run.example_prompt.endswith("Answer:")
    assert {"torch", "processor"} <= set(run.machine)


def test_controls_can_be_left_out_and_labels_must_differ(lm2: Any, tokenizer: Any, fake_source: Any) -> None:
    spec = ModelSpec("LM2", lm2, tokenizer)
    bare = SuiteOptions(("qa1",), ("0k",), num_samples=5, max_new_tokens=2, controls=False)
    assert len(evaluate_models([spec], bare, samples=fake_source).results) == 1
    with pytest.raises(ConfigError, match="label"):
        evaluate_models([spec, spec], OPTIONS, samples=fake_source)
    with pytest.raises(ConfigError, match="no model"):
        evaluate_models([], OPTIONS)


def test_what_a_checkpoint_was_trained_for_comes_from_its_folder(tmp_path: Path) -> None:
    assert (trained_layout(tmp_path), trained_tasks(tmp_path), training_facts(tmp_path)) == ("official", [], {})
    (tmp_path / "recipe.yaml").write_text("data:\n  tasks: {qa1: 1.0, qa9: 2.0}\nevaluation:\n  layout: short\n")
    (tmp_path / "summary.json").write_text('{"tokens": 7, "trained_length": 512, "minutes": 3}')
    assert trained_layout(tmp_path) == "short"
    assert trained_tasks(tmp_path) == ["qa1", "qa9"]
    assert training_facts(tmp_path) == {"tokens": 7, "trained_length": 512}
    (tmp_path / "recipe.yaml").write_text("evaluation:\n  layout: tall\n")
    with pytest.raises(DataError, match="tall"):
        trained_layout(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [1\n")
    with pytest.raises(DataError, match="not valid YAML"):
        trained_tasks(tmp_path)


def test_real_test_stories_are_found_by_task(real_data: Path) -> None:
    stories = read_test_stories(real_data / "babi" / "en-10k", ("qa1", "qa10"))
    assert {task: sum(len(story.questions) for story in told) for task, told in stories.items()} == {
        "qa1": 1000,
        "qa10": 1000,
    }


def test_a_task_without_its_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"qa1_\*_test\.txt"):
        read_test_stories(tmp_path, ("qa1",))


def test_published_sets_are_read_by_their_paths(tmp_path: Path) -> None:
    (tmp_path / "qa1").mkdir()
    record = {"input": "Mary went to the office.", "question": "Where is Mary?", "target": "office"}
    (tmp_path / "qa1" / "4k.json").write_text(json.dumps([record, record]))
    samples = read_published([tmp_path], num_samples=1)
    assert (samples.tasks(), samples.lengths()) == (["qa1"], ["4k"])
    sample = samples.cell("qa1", "4k")[0]
    assert (sample.task, sample.input, sample.target) == ("qa1", record["input"], "office")
    assert len(samples.cell("qa1", "4k")) == 1
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match=r"qa1/4k\.json"):
        read_published([tmp_path / "other.json"])
