import json
import sys
from pathlib import Path

import pytest

from mnemon.cli import data as data_module
from mnemon.cli.app import main
from mnemon.data import babi
from mnemon.data.babilong import read_json
from mnemon.data.mqar import MqarSettings, generate
from mnemon.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Mary went to the garden. Where is Mary?"] * 3, 300).save_pretrained(folder)
    return str(folder)


def test_babi_stories_are_written_in_the_official_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "qa2_own.txt"
    assert main(["data", "babi", "--task", "qa2", "--stories", "3", "--seed", "7", "-o", str(path)]) == 0
    assert babi.read(path) == babi.generate("qa2", 3, 7)
    assert str(path) in capsys.readouterr().err
    assert main(["data", "babi", "--task", "qa2", "--stories", "3", "--seed", "7"]) == 0
    assert capsys.readouterr().out == path.read_text()


def test_babilong_samples_are_written_in_the_published_form(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "qa6_1k.json"
    command = ["data", "babilong", "--task", "qa6", "--length", "1k", "--samples", "3", "--tokenizer", tokenizer_folder]
    assert main([*command, "-o", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["length"], facts["file"]) == (3, 1000, str(path))
    samples = read_json(path)
    assert [(sample.task, sample.length) for sample in samples] == [("qa6", 1000)] * 3
    assert main(command) == 0
    assert capsys.readouterr().out == path.read_text()


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("precious")
    assert main(["data", "babi", "-o", str(path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert main(["data", "babi", "-o", str(path), "--overwrite"]) == 0
    assert path.read_text().startswith("1 ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["babi", "--task", "qa1x"], "did you mean"),
        (["babi", "--task", "qa12"], "can be generated"),
        (["babi", "--stories", "0"], "--stories"),
        (["babi", "-o", "."], "is a folder"),
        (["babilong", "--length", "4q"], "expected a length such as"),
        (["babilong", "--task", "qa"], "did you mean"),
        (["babilong", "--json"], "-o FILE"),
        (["babilong", "--split", "dev", "--tokenizer", "TOKENIZER"], "train or test"),
        (["babilong", "--background", "nowhere", "--tokenizer", "TOKENIZER"], "nowhere"),
        (["babilong", "--tokenizer", "no-such-name"], "no-such-name"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    words: list[str], says: str, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *(tokenizer_folder if word == "TOKENIZER" else word for word in words)]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    assert main(["data", "babilong", "--tokenizer", str(tmp_path)]) == 2
    assert "cannot load the tokenizer" in capsys.readouterr().err


def test_help_names_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "babilong", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "tokens" in shown
    assert "4k" in shown
    assert data_module.DEFAULT_TOKENIZER in shown


def test_a_bar_appears_only_on_a_terminal_and_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(data_module, "PROGRESS_DELAY_SECONDS", 0.0)
    assert list(data_module._with_progress(iter("abc"), 3, "title")) == ["a", "b", "c"]  # type: ignore[arg-type, comparison-overlap]


def test_mqar_samples_are_written_one_per_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mqar.jsonl"
    command = ["data", "mqar", "--length", "16", "--pairs", "2", "--vocab-size", "20", "--samples", "5", "--seed", "4"]
    assert main([*command, "--zero-fillers", "-o", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["num_pairs"], facts["random_non_queries"]) == (5, 2, False)
    made = generate(MqarSettings(20, 16, 2, random_non_queries=False), 5, seed=4)
    assert [json.loads(line) for line in path.read_text().splitlines()] == made.records()
    assert main([*command, "--zero-fillers"]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert main(command) == 0
    assert capsys.readouterr().out != path.read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--length", "15"], "expected an even length, got 15; use 16"),
        (["--pairs", "17"], "= 68 tokens, got length 64; use 68 or more"),
        (["--vocab-size", "64"], "vocab_size above the length 64, got 64; use 65"),
        (["--passes", "0"], "num_passes of at least 1"),
        (["--power-a", "0"], "power_a above 0"),
        (["--samples", "0"], "--samples"),
        (["--json"], "-o FILE"),
        (["-o", "."], "is a folder"),
    ],
)
def test_a_mistake_in_mqar_is_one_line_and_exit_code_two(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "mqar", *words]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
