"""`mnemon convert` makes a published checkpoint usable, says what it did, and refuses the rest in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_mom import MOM, random_weights, save

from mnemon.cli.app import main
from mnemon.data.tokenizer import train_tokenizer


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A random checkpoint in flash-linear-attention's format, with a tokenizer."""
    tokenizer = train_tokenizer(["Mary went to the garden. John took the milk to the office."], 300)
    config: dict[str, Any] = MOM | {"vocab_size": len(tokenizer), "num_hidden_layers": 1}
    folder = save(tmp_path / "published", config, random_weights(config, torch.float32))
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    return folder


def test_a_converted_checkpoint_generates(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = tmp_path / "ours"
    assert main(["convert", str(published), str(ours)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{ours}: ")
    assert captured.out.endswith(" parameters in float32, mom to mnemon\n")
    assert captured.err == ""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (ours / name).read_bytes() == (published / name).read_bytes()
    assert main(["generate", str(ours), "--prompt", "Mary went", "--max-new-tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] >= 1


def test_it_goes_back_and_says_so_as_json(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["convert", str(published), ours, "--json"]) == 0
    assert main(["convert", ours, back, "--to", "fla", "--json"]) == 0
    there, again = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (there["source_format"], there["target_format"], there["dtype"]) == ("mom", "mnemon", "float32")
    assert (again["source_format"], again["target_format"], again["notes"]) == ("mnemon", "mom", [])
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()


def test_remarks_go_to_standard_error(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (published / "tokenizer.json").unlink()
    (published / "tokenizer_config.json").unlink()
    assert main(["convert", str(published), str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().err == (
        "note: there was no tokenizer to copy; `mnemon generate` needs one in the folder\n"
    )


def test_a_folder_is_replaced_only_when_asked_and_only_if_it_is_ours(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours"
    assert main(["convert", str(published), str(ours)]) == 0
    (ours / "stale").touch()
    assert main(["convert", str(published), str(ours)]) == 2
    assert "holds files already; use --overwrite" in capsys.readouterr().err
    assert main(["convert", str(published), str(ours), "--overwrite"]) == 0
    assert not (ours / "stale").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert main(["convert", str(published), str(foreign), "--overwrite"]) == 2
    assert "another origin" in capsys.readouterr().err
    assert (foreign / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere", "out"), "has no config.json; expected the local folder of a checkpoint"),
        (("nowhere", "out", "--to", "gguf"), "'gguf' is not one of 'mnemon', 'fla'"),
        (("nowhere",), "Missing argument 'DST'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
