"""The tour on random models: planning within a time, training and asking, the whole command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from mnemon import LM2Config, LM2ForCausalLM, demo
from mnemon.cli.app import main
from mnemon.data import babi
from mnemon.data.tokenizer import train_tokenizer
from mnemon.errors import CheckpointError
from mnemon.metrics.intervals import Interval
from mnemon.training import load_recipe

COSTS = st.dictionaries(st.sampled_from(demo.LENGTHS), st.floats(1e-3, 1e3), min_size=1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders like the shipped ones, with random weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    stories = [" ".join(line.text for line in story.lines) for story in babi.generate("qa1", 40, 0)]
    tokenizer = train_tokenizer([*stories, "<context>\n</context>\n\nQuestion: Answer:"], 400)
    base = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    options = {"base_config": base, "num_slots": 4, "segment_length": 32, "attention_span": 32}
    torch.manual_seed(0)
    models = {
        "babilong-tiny-lm2": LM2ForCausalLM(LM2Config(**options)),
        "babilong-tiny-plain": LlamaForCausalLM(base),
        "babilong-tiny-window": LM2ForCausalLM(LM2Config(**options, memory_layers=[])),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        (root / name / "recipe.yaml").write_text("data: {tasks: {qa1: 1.0}}\nevaluation: {layout: short}\n")
    return {name: root / name for name in models}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe that trains for a few steps."""
    raw = load_recipe("demo-lm2").model_dump(mode="json")
    raw["model"]["base"].update(hidden_size=16, intermediate_size=16)
    raw["model"]["lm2"].update(num_slots=4, slot_dim=16)
    raw["data"].update(lengths=[0, 48], fact_limits=[])
    raw["data"]["curriculum"].update(threshold=0.0, window=4, min_stage_tokens=0)
    raw["optimisation"].update(batch_tokens=512, max_tokens=2000, device="cpu", threads=None)
    raw["evaluation"]["samples"] = 0
    raw["output"]["tensorboard"] = False
    path = tmp_path_factory.mktemp("recipe") / "tour.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture
def tiny_tour(checkpoints: dict[str, Path], recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command take the random checkpoints, the quick recipe and two short lengths."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(demo, "shipped_checkpoints", lambda: checkpoints)
    monkeypatch.setattr(demo, "RECIPE", str(recipe))
    monkeypatch.setattr(demo, "LENGTHS", ("0k", "1k"))


@given(costs=COSTS, most=st.integers(1, 100), seconds=st.floats(0, 1e4))
def test_a_plan_keeps_within_the_time_unless_one_sample_each_is_too_much(
    costs: dict[str, float], most: int, seconds: float
) -> None:
    plan = demo.plan_samples(costs, most, seconds)
    assert all(1 <= count <= most for count in plan.values())
    needed = sum(costs[name] * count for name, count in plan.items())
    assert needed <= seconds * (1 + 1e-9) or set(plan.values()) == {1}
    if sum(costs.values()) * most < seconds * (1 - 1e-9):
        assert set(plan.values()) == {most}


@given(costs=COSTS, most=st.integers(1, 100), seconds=st.floats(0, 1e4))
def test_what_costs_more_is_never_asked_more_often(costs: dict[str, float], most: int, seconds: float) -> None:
    plan = demo.plan_samples(costs, most, seconds)
    by_cost = sorted(plan, key=lambda name: costs[name])
    assert [plan[name] for name in by_cost] == sorted(plan.values(), reverse=True)


def test_two_threads_are_taken_only_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    speed = {1: 1.0, 2: 5.0}
    monkeypatch.setattr(demo, "_seconds", lambda *_: speed[torch.get_num_threads()])
    options = demo.SuiteOptions(("qa1",), ("1k",))
    with demo.own_threads():
        assert demo.faster_threads([None], options, {1000: ["x"]}) == 1
        speed[2] = 0.6
        assert demo.faster_threads([None], options, {1000: ["x"]}) == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        assert demo.faster_threads([None], options, {1000: ["x"]}) == 1


@given(per_token=st.floats(1e-6, 1e-3), per_pair=st.floats(0, 1e-8), tokens=st.integers(250, 20_000))
def test_a_prediction_is_exact_for_costs_linear_and_quadratic_in_the_tokens(
    per_token: float, per_pair: float, tokens: int
) -> None:
    def seconds(size: int) -> float:
        return per_token * size + per_pair * size**2

    points = [(1000, seconds(1000)), (8000, seconds(8000))]
    assert demo.predict_seconds(points, tokens) == pytest.approx(seconds(tokens), rel=1e-6)
    assert demo.predict_seconds([(1000, 2.0)], 500) == pytest.approx(1.0)


def test_missing_checkpoints_are_one_clear_line(
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    some = {name: folder for name, folder in checkpoints.items() if name != "babilong-tiny-plain"}
    monkeypatch.setattr(demo, "shipped_checkpoints", lambda: some)
    with pytest.raises(CheckpointError, match="lacks the checkpoints babilong-tiny-plain;"):
        demo.find_checkpoints()
    assert main(["demo", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "babilong-tiny-plain" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_lesson_says_what_was_learned_and_what_the_memory_does() -> None:
    shares = {"with_memory": Interval(0.96, 0.9, 0.98), "knocked_out": Interval(0.2, 0.13, 0.29)}
    lesson = demo.Lesson(("qa1",), True, 128, 32, 100, guessing=1 / 6, minutes=2.84, tokens=4_000_000, **shares)
    assert lesson.sentences() == (
        "Learned in 2.8 minutes: qa1 over 128 tokens, of which the attention sees 32.",
        "100 new questions: 96 % [90–98] right with the memory, 20 % [13–29] with the memory knocked out; always the "
        "most frequent answer: 17 %.",
    )
    assert (
        replace(lesson, learned=False, length=0)
        .sentences()[0]
        .startswith("Not learned within 2.8 minutes: qa1 over the bare facts.")
    )


def test_the_whole_tour_writes_everything_and_protects_it(
    tiny_tour: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tour"
    words = ["demo", "-o", str(folder), "--samples", "2", "--seed", "5"]
    threads = torch.get_num_threads()
    assert main(words) == 0
    captured = capsys.readouterr()
    for text in ("Learned in", "48 tokens, of which the attention sees 32", "knocked out", "window", "report.html"):
        assert text in captured.out
    assert "Loading weights" not in captured.err
    names = {path.name for path in folder.iterdir()}
    assert names >= {"train", "report.html", "predictions.jsonl", "results.json", "table.md", "demo.json"}
    assert names >= {"accuracy_over_length.png", "capabilities.png"}
    facts = json.loads((folder / "demo.json").read_text())
    assert facts["samples"] == {"0k": 2, "1k": 2}
    assert facts["training"]["questions"] == 100
    assert json.loads((folder / "train" / "summary.json").read_text())["seed"] == 5
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 4 * 2 * 2
    assert torch.get_num_threads() == threads
    assert main(words) == 2
    assert "already holds a run; use --overwrite or another folder" in capsys.readouterr().err
    assert (folder / "train").is_dir()


def test_the_tour_can_be_taken_again_without_training_and_as_json(
    tiny_tour: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".mnemon-run").touch()
    (tmp_path / "report.html").write_text("of an earlier run")
    words = ["demo", "-o", str(tmp_path), "--skip-training", "--overwrite", "--samples", "8", "--minutes", "0.1"]
    assert main([*words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["training"] is None
    assert [result["label"] for result in value["results"]] == ["LM2", "LM2 (knocked out)", "plain", "window"]
    asked = {cell["length"]: cell["num_samples"] for cell in value["results"][0]["cells"]}
    assert asked == value["samples"]
    assert "of an earlier run" not in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "train").exists()


def test_ctrl_c_leaves_whole_files_and_says_how_to_go_on(
    tiny_tour: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "seconds_per_sample", interrupted)
    folder = tmp_path / "tour"
    assert main(["demo", "-o", str(folder), "--json"]) == 130
    assert "start again with --overwrite" in capsys.readouterr().err
    assert (folder / "train" / "model.safetensors").is_file()
    assert not (folder / "results.json").exists()


def test_ctrl_c_during_training_ends_the_tour(
    tiny_tour: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "train", lambda *_, **__: {"stop_reason": "interrupted"})
    assert main(["demo", "-o", str(tmp_path / "tour")]) == 130
    captured = capsys.readouterr()
    assert "Evaluating" not in captured.out
    assert captured.err.splitlines()[-1] == "mnemon: interrupted"
