"""`mnemon eval --suite mmlu`, `recall`, `commonsense`, `longbench` and `all` as a user meets them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mnemon.cli.app import main
from mnemon.evaluation.controls import ModelSpec
from mnemon.evaluation.harness import runner
from mnemon.evaluation.harness.data import DataSource
from mnemon.evaluation.harness.records import read_run
from mnemon.evaluation.harness.runner import evaluate_suite
from mnemon.evaluation.harness.tasks import TaskOptions
from mnemon.evaluation.sample_scores import read_sample_scores


def test_two_models_answer_the_same_samples_and_everything_is_written(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    words = ["eval", str(saved / "tiny-lm2"), f"Llama={saved / 'tiny-plain'}", "--suite", "commonsense"]
    words += ["--tasks", "arc_easy,lambada,wikitext,hellaswag,winogrande,piqa,arc_challenge", "--limit", "2"]
    assert main([*words, "--data", "sample", "--profile", "-o", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "In the models' forward" in printed.out
    assert "Transformer++, published" in printed.out
    assert "made up" in printed.out
    assert "Traceback" not in printed.err
    run = read_run(folder)
    assert list(run.models) == ["tiny-lm2", "tiny-lm2 (knocked out)", "Llama"]
    assert run.machine["lm_eval"].startswith("0.4")
    for label in run.models:
        ids = [(sample.task, sample.id, sample.sample_sha256) for sample in run.samples if sample.model == label]
        assert len(ids) == 14
        assert ids == [(one.task, one.id, one.sample_sha256) for one in run.samples if one.model == "Llama"]
    row = run.row("Llama", "lambada", "perplexity")
    assert row is not None
    assert row.value > 1
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert all({"model", "suite", "task", "id", "score"} <= set(line) for line in lines)
    assert "| Llama | arc_easy | acc |" in (folder / "table.md").read_text()


def test_numbers_are_those_that_the_harness_itself_averages(plain: Any, tokenizer: Any, monkeypatch: Any) -> None:
    theirs: dict[str, dict[str, float]] = {}
    evaluate = runner.lm_eval.evaluate

    def spy(**arguments: Any) -> Any:
        outcome = evaluate(**arguments)
        theirs.update(outcome["results"])
        return outcome

    monkeypatch.setattr(runner.lm_eval, "evaluate", spy)
    spec = ModelSpec("plain", plain, tokenizer)
    tasks = ["arc_challenge", "lambada", "wikitext"]
    run = evaluate_suite("commonsense", [spec], DataSource.parse("sample"), TaskOptions(), tasks=tasks)
    names = {"lambada": "lambada_standard"}
    for row in run.rows:
        assert row.value == pytest.approx(theirs[names.get(row.task, row.task)][f"{row.metric},none"], rel=1e-9)
    assert {row.metric for row in run.rows} == {"acc", "acc_norm", "perplexity", "word_perplexity"}


def test_finished_tasks_are_taken_over_and_other_weights_are_not(
    lm2: Any, plain: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    evaluate = runner.lm_eval.evaluate

    def counting(**arguments: Any) -> Any:
        asked.extend(arguments["task_dict"]["tasks"])
        return evaluate(**arguments)

    monkeypatch.setattr(runner.lm_eval, "evaluate", counting)
    source = DataSource.parse("sample")

    def run(model: Any, *tasks: str, limit: int = 2) -> Any:
        spec = ModelSpec("same label", model, tokenizer)
        return evaluate_suite("recall", [spec], source, TaskOptions(limit), tasks=tasks, cells_folder=tmp_path)

    first = run(plain, "fda")
    again = run(plain, "fda", "nq")
    assert asked == ["fda", "nq"]
    assert [row.task for row in again.rows] == ["fda", "nq"]
    assert again.rows[0] == first.rows[0]
    assert again.samples[: len(first.samples)] == first.samples
    assert run(plain, "fda", limit=1).rows[0].num_samples == 1
    assert run(lm2, "fda").models["same label"]["weights"] != first.models["same label"]["weights"]
    assert asked == ["fda", "nq", "fda", "fda"]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", str(saved / "tiny-plain"), "--suite", "recall", "--tasks", "fda,drop", "--data", "sample"]
    words += ["--answer-length", "3", "-o", str(tmp_path / "out"), "--json"]
    evaluate = runner.lm_eval.evaluate
    calls: list[str] = []

    def interrupted(**arguments: Any) -> Any:
        calls.extend(arguments["task_dict"]["tasks"])
        if calls == ["fda", "drop"]:
            raise KeyboardInterrupt
        return evaluate(**arguments)

    monkeypatch.setattr(runner.lm_eval, "evaluate", interrupted)
    assert main(words) == 130
    assert "go on with --resume" in capsys.readouterr().err
    assert main(words) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert calls == ["fda", "drop", "drop"]
    value = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["num_samples"], row["num_dropped"]) for row in value["rows"]] == [
        ("fda", 2, 1),
        ("drop", 2, 1),
    ]
    assert len(read_sample_scores(tmp_path / "out" / "samples.jsonl")) == 4


def test_mmlu_is_shown_in_the_groups_of_the_paper_with_examples_before_every_question(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    words = ["eval", str(saved / "tiny-plain"), "--suite", "mmlu", "--data", "sample", "--num-fewshot", "1"]
    assert main([*words, "--limit", "1", "-o", str(folder)]) == 0
    printed = capsys.readouterr().out
    for group in ("STEM", "Social Sciences", "High School", "General Knowledge", "Average"):
        assert group in printed
    assert all(number in printed for number in ("28.1", "32.2", "29.4")), "the published LM2"
    assert "10 of 57 tasks" in " ".join(printed.split())
    run = read_run(folder)
    assert len(run.left_out) == 47
    assert {row.num_fewshot for row in run.rows} == {1}
    table = (folder / "table.md").read_text()
    assert "| Humanities | 3 |" in table
    assert "| 28.7 | 26.7 | 32.2 |" in table


def test_longbench_is_scored_by_the_harness_in_both_languages(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(saved / "tiny-plain"), "--suite", "longbench", "--data", "sample", "--limit", "1"]
    tasks = "trec,passage_count,passage_retrieval_zh,lcc"
    assert main([*words, "--tasks", tasks, "--context-length", "200", "-o", str(tmp_path / "out"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["format"] == "mnemon-harness-1"
    assert {row["task"]: row["metric"] for row in value["rows"]} == dict.fromkeys(tasks.split(","), "score")
    assert all(0 <= row["value"] <= 1 for row in value["rows"])
    assert any(row["num_truncated"] for row in value["rows"])


def test_all_runs_what_there_is_data_for_and_says_what_it_left_out(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = tmp_path / "data", tmp_path / "out"
    (data / "piqa").mkdir(parents=True)
    row = {"goal": "To dry a coat,", "sol1": "hang it up", "sol2": "wet it", "label": 0}
    (data / "piqa" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "books").mkdir()
    for number in range(3):
        (tmp_path / "books" / f"{number}.txt").write_text("The old ship sailed over the calm sea. " * 20)
    words = ["eval", str(saved / "tiny-plain"), "--suite", "all", "--data", str(data), "--lengths", "0k"]
    words += [
        "--samples",
        "2",
        "--slices",
        "16x2",
        "--background",
        str(tmp_path / "books"),
        "--json",
        "-o",
        str(folder),
    ]
    assert main(words) == 0
    value = json.loads(capsys.readouterr().out)
    assert set(value["suites"]) == {"babilong", "mqar", "commonsense"}
    assert set(value["left_out"]) == {"perplexity", "mmlu", "recall", "longbench"}
    assert "at least 2 windows" in value["left_out"]["perplexity"]
    assert "no file of the suite recall" in value["left_out"]["recall"]
    assert json.loads((folder / "results.json").read_text())["left_out"] == value["left_out"]
    table = (folder / "table.md").read_text()
    assert "## commonsense" in table
    assert "Left out: " in table
    assert read_run(folder / "commonsense").settings["tasks"] == ["piqa"]
    assert main([*words, "--resume"]) == 0
    (data / "piqa" / "validation.jsonl").write_text("{\n")
    assert main([*words, "--overwrite"]) == 2, "damaged data are not passed over"
    assert "line 1: not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "mmul"], "unknown suite 'mmul'; did you mean 'mmlu'"),
        (["--suite", "mmlu", "--tasks", "anatomie", "--data", "sample"], "did you mean 'anatomy'"),
        (["--suite", "recall", "--data", "nowhere"], "nowhere: no such folder of data"),
        (["--suite", "recall", "--data", "sample", "--data", "b"], "--data takes one folder"),
        (["--suite", "recall"], "HF_HUB_OFFLINE=1; give --data DIR"),
        (
            ["--suite", "recall", "--data", "sample", "--num-fewshot", "1"],
            "--num-fewshot is for --suite mmlu, commonsense",
        ),
        (["--suite", "mmlu", "--data", "sample", "--lengths", "1k"], "--lengths is for --suite babilong"),
        (["--suite", "mmlu", "--data", "sample", "--limit", "0"], "--limit"),
        (["--suite", "mmlu", "--data", "sample", "--num-fewshot", "9"], "at least 9 rows in the split 'dev'"),
        (["--suite", "recall", "--data", "sample", "--context-length", "9999"], "tiny-plain reads at most 2048 tokens"),
        (["--suite", "recall", "--data", "sample", "--context-length", "40"], "no room for a text"),
        (["--suite", "recall", "--data", "sample", "--batch-size", "0"], "--batch-size must be auto or a number"),
        (["--data", "sample"], "babilong makes its own samples"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["eval", str(saved / "tiny-plain"), *words, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("mnemon: error:")
    assert message in error[-1]


def test_a_profile_of_babilong_tells_the_model_from_the_making_of_samples(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("The old ship sailed over the calm sea. " * 20)
    words = ["eval", str(saved / "tiny-plain"), "--lengths", "0k", "--limit", "8", "--profile"]
    assert main([*words, "--background", str(tmp_path), "-o", str(tmp_path / "out")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("In the models' forward")]
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", line)]
    assert 0 < numbers[0] <= numbers[1]
    assert "making the samples took" in line


def test_a_model_without_tokenizer_is_refused(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(saved / "no-tokenizer"), "--suite", "recall", "--data", "sample", "-o", str(tmp_path / "out")]
    assert main(words) == 2
    assert "no-tokenizer has no tokenizer, so it reads no text" in capsys.readouterr().err


def test_results_that_do_not_fit_their_samples_are_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mnemon.errors import DataError

    folder = tmp_path / "out"
    words = ["eval", str(saved / "tiny-plain"), "--suite", "recall", "--tasks", "fda", "--data", "sample"]
    assert main([*words, "--answer-length", "2", "-o", str(folder)]) == 0
    samples = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(samples.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="expected 2 samples of tiny-plain on fda, got 1"):
        read_run(folder)
    (folder / "samples.jsonl").write_text(samples)
    results = (folder / "results.json").read_text()
    (folder / "results.json").write_text(results.replace('"value": 0.0', '"value": NaN'))
    with pytest.raises(DataError, match="finite numbers, got NaN"):
        read_run(folder)
    (folder / "results.json").write_text(results.replace("mnemon-harness-1", "other"))
    with pytest.raises(DataError, match="expected a file of the format"):
        read_run(folder)
