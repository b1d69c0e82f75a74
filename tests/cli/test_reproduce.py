"""`mnemon reproduce` as a user types it."""

import json
from pathlib import Path

import pytest

from mnemon.cli.app import main


def test_a_dry_run_prints_every_run_and_the_sums_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["reproduce", "mom-mqar", "--scale", "tiny", "--only", "gla.single", "--only", "gla.mom", "--seeds", "2"]
    assert main([*words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gla.single/lr-0.003/seed-0: 6,176 parameters, 2,048 tokens")
    assert "minutes (measured)" in lines[0]
    assert lines[4] == "4 runs, 8,192 tokens of training in all"
    assert lines[5].startswith("4 of them left")
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["parameters"]["active"] for row in plan["runs"]] == [6176, 10432, 6176, 10432]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mom-mqra"], "did you mean mom-mqar"),
        (["mom-mqar", "--scale", "huge"], "has no scale 'huge'"),
        (["mom-mqar", "--only", "nothing.*"], "--only nothing.*: no variant"),
        (["mom-mqar", "--background", "books"], "--background says nothing about mom-mqar"),
        (["mom-mqar", "--tune", "fast"], "--tune fast: expected learning rates above 0"),
        (["mom-mqar", "--tune", "-1"], "--tune -1: expected learning rates above 0"),
        (["mom-mqar", "--set", "data.vocab=3"], "unknown key data.vocab"),
        (["lm2-table1", "--only", "plain", "--tune", "0.001"], "compares recipes as they are"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *words, "--output", str(tmp_path / "study")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "study").exists()
