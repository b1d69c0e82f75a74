"""`mnemon train` as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mnemon.cli.app import main
from mnemon.training import load_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe file of a model so small that its tokenizer and training take seconds."""
    raw = load_recipe("demo-lm2").model_dump(mode="json")
    raw["name"] = "small-demo"
    raw["model"]["base"].update(hidden_size=16, intermediate_size=16)
    raw["model"]["lm2"].update(num_slots=4, slot_dim=16)
    raw["data"]["lengths"] = [0]
    raw["optimisation"].update(batch_tokens=512, max_tokens=3000, max_minutes=None, device="cpu", threads=1)
    raw["evaluation"].update(samples=2, lengths=[0])
    raw["output"].update(tensorboard=False, save_every_steps=2)
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def test_a_dry_run_prints_the_resolved_recipe_and_the_parameters_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "--dry-run", "--set", "model.lm2.num_slots=8"]) == 0
    text = capsys.readouterr().out
    assert "num_slots: 8" in text
    assert "parameters: total" in text
    assert main(["train", "babilong-tiny-lm2", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"]["name"] == "babilong-tiny-lm2"
    assert plan["parameters"]["memory"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-recipe"], "no recipe no-such-recipe: expected a YAML file"),
        (["demo-lm"], "did you mean demo-lm2"),
        (["demo-lm2", "--set", "data.taks=[qa1]"], "unknown key data.taks; did you mean data.tasks"),
        (["demo-lm2", "--set", "model.lm2.segment_length=0"], "model.lm2.segment_length: "),
        (["demo-lm2", "--set", "model.lm2.num_slots=0"], "model.lm2.num_slots: "),
        (["demo-lm2", "--set", "model.lm2.num_memory_heads=5", "--dry-run"], "not divisible"),
        (["demo-lm2", "--set", "model.lm2.attention_span=8", "--dry-run"], "attention_span=8 is below segment_length"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_run_prints_its_summary_as_json_and_refuses_to_run_over_itself(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(recipe), "--output", str(tmp_path / "run")]
    assert main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["stop_reason"] == "max_tokens"
    assert summary["validation"]["0"]["qa1"]["asked"] == 2
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "0 tokens  qa1" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(recipe: Path, tmp_path: Path) -> None:
    words = ["train", str(recipe), "--output", str(tmp_path / "run"), "--set", "optimisation.max_tokens=100000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mnemon", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with --resume" in error
    assert "Traceback" not in error
    newest = max(tmp_path.glob("run/checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert f"at step {newest.name.split('-')[1]};" in error
