"""`mnemon eval` as a user meets it: whole command lines on tiny saved models."""

import json
from pathlib import Path
from typing import Any

import pytest

from mnemon.cli.app import main
from mnemon.evaluation.run import read_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, lm2: Any, plain: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("tiny-lm2", lm2), ("tiny-plain", plain)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "tiny-lm2" / "recipe.yaml").write_text("data: {tasks: [qa1, qa6]}\nevaluation: {layout: short}\n")
    return folder


def test_two_models_are_compared_and_everything_is_written(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    words = ["eval", str(saved / "tiny-lm2"), f"Llama={saved / 'tiny-plain'}", "--lengths", "0k,1k", "--samples", "3"]
    assert main([*words, "--max-new-tokens", "3", "-o", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "tiny-lm2 (knocked out)" in printed
    assert "Llama" in printed
    names = {path.name for path in folder.iterdir()}
    assert names >= {"results.json", "predictions.jsonl", "table.md", "report.html", "accuracy_over_length.png"}
    value = json.loads((folder / "results.json").read_text())
    assert value["results"][0]["settings"]["tasks"] == ["qa1", "qa6"]
    assert value["results"][0]["settings"]["layout"] == "short"


def test_a_folder_with_results_is_protected_and_can_be_resumed(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(saved / "tiny-plain"), "--tasks", "qa1", "--layout", "short", "--samples", "2", "--json"]
    words += ["--max-new-tokens", "2", "-o", str(tmp_path / "out"), "--lengths"]
    assert main([*words, "0k"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*words, "0k"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*words, "0k,1k", "--resume"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["results"][0]["cells"][0] == first["results"][0]["cells"][0]
    assert len(second["results"][0]["cells"]) == 2


def test_samples_at_takes_other_numbers_at_some_lengths(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(saved / "tiny-plain"), "--tasks", "qa1", "--layout", "short", "--samples", "3", "--json"]
    words += ["--max-new-tokens", "2", "-o", str(tmp_path / "out"), "--lengths", "0k,1k", "--samples-at", "1k=1"]
    assert main(words) == 0
    cells = json.loads(capsys.readouterr().out)["results"][0]["cells"]
    assert [(cell["length"], cell["num_samples"]) for cell in cells] == [("0k", 3), ("1k", 1)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "qa1,qa99"], "unknown task 'qa99'"),
        (["--lengths", "3x"], "3x"),
        (["--layout", "long"], "unknown layout 'long'"),
        (["--batch-size", "none"], "--batch-size"),
        (["--samples-at", "8k"], "LENGTH=NUMBER"),
        (["--suite", "mmlo"], "unknown suite 'mmlo'; did you mean 'mmlu'?"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--babi", "nowhere"], "expected one file qa1_"),
        (["--babi", "a", "--data", "b"], "exclude each other"),
        (["--data", "nowhere/x.json"], "qa1/4k.json"),
        (["--background", "nowhere", "--samples", "1"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["eval", str(saved / "tiny-lm2"), "-o", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mnemon: error:")
    assert message in error


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "no-such-model", "-o", str(tmp_path)]) == 2
    assert "no-such-model" in capsys.readouterr().err


def test_real_data_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnemon.cli.display import command_line, portable

    monkeypatch.setenv("MNEMON_REAL_DATA", "/somewhere/data/")
    assert portable("/somewhere/data/babi") == "$MNEMON_REAL_DATA/babi"
    assert portable("/elsewhere/babi") == "/elsewhere/babi"
    line = command_line(["x", "eval", "m", "--babi", "/somewhere/data/babi", "--tasks", "a b"])
    assert line == "mnemon eval m --babi \"$MNEMON_REAL_DATA/babi\" --tasks 'a b'"


def test_diagnostics_show_what_the_memory_does_and_are_kept_with_the_run(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    words = ["eval", str(saved / "tiny-lm2"), str(saved / "tiny-plain"), "--lengths", "0k,1k", "--samples", "2"]
    assert main([*words, "--max-new-tokens", "2", "--no-controls", "--diagnostics", "-o", str(folder)]) == 0
    assert "What the memory does" in capsys.readouterr().out
    run = read_run(folder)
    assert [(report.label, report.length, report.num_samples) for report in run.diagnostics] == [
        ("tiny-lm2", "0k", 4),
        ("tiny-lm2", "1k", 4),
    ]
    assert 0 <= run.diagnostics[1].means["read_on_written"] <= 1
    assert abs(sum(run.diagnostics[1].read_shares["block0"]) - 1) < 1e-5
    assert "What the memories do" in (folder / "table.md").read_text()
    assert "What the memories do" in (folder / "report.html").read_text()
