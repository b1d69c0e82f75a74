"""Whole runs with a tiny model: repeatable, resumable, interruptible, and stopped by the first non-finite number."""

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemon.errors import CheckpointError, ConfigError, RunError
from mnemon.training import train
from mnemon.training.recipe_io import check_recipe
from mnemon.training.trainer import AnswerTrainer, learning_rate_factor

LM2 = {"num_slots": 4, "slot_dim": 16, "num_memory_heads": 2, "segment_length": 32, "attention_span": 32}


def run(raw: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    return train(check_recipe(raw), folder, show_progress=False, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def run_states(folder: Path) -> list[Any]:
    states = [json.loads(path.read_text()) for path in sorted((folder / "checkpoints").glob("*/run_state.json"))]
    for state in states:
        del state["seconds"]
    return states


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have `action` applied to the loss of one step (counted from 1)."""
    original = AnswerTrainer.compute_loss

    def patched(self: AnswerTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        return action(loss) if self.state.global_step + 1 == step else loss

    monkeypatch.setattr(AnswerTrainer, "compute_loss", patched)


def press_ctrl_c_once() -> Callable[[torch.Tensor], torch.Tensor]:
    presses = iter([signal.SIGINT])

    def press(loss: torch.Tensor) -> torch.Tensor:
        for number in presses:
            signal.raise_signal(number)
        return loss

    return press


@pytest.mark.parametrize("kind", ["plain", "lm2"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    tiny: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    if kind == "lm2":
        tiny["model"].update(kind="lm2", lm2=LM2)
    for name in ("a", "b"):
        run(tiny, tmp_path / name)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    run({**tiny, "seed": 4}, tmp_path / "c")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("kind", ["plain", "lm2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, accumulation: int
) -> None:
    tiny["optimisation"]["gradient_accumulation"] = accumulation
    if kind == "lm2":
        tiny["model"].update(kind="lm2", lm2=LM2)
    whole = run(tiny, tmp_path / "whole")
    assert whole["trained_length"] > 0, "the curriculum must move for this test to say anything"
    with monkeypatch.context() as patch:
        at_step(patch, 6, press_ctrl_c_once())
        stopped = run(tiny, tmp_path / "cut")
    assert (stopped["stop_reason"], stopped["steps"]) == ("interrupted", 6)
    resumed = run(tiny, tmp_path / "cut", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert run_states(tmp_path / "whole")[-1] == run_states(tmp_path / "cut")[-1]
    for key in ("steps", "tokens", "stages", "stop_reason", "validation"):
        assert whole[key] == resumed[key]
    log = [json.loads(line) for line in (tmp_path / "cut" / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == sorted({entry["step"] for entry in log})


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_non_finite_number_stops_the_run_and_keeps_the_last_checkpoint(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def poison(loss: torch.Tensor) -> torch.Tensor:
        return loss * float("nan") if what == "loss" else loss + (loss - loss.detach()) * float("inf")

    with monkeypatch.context() as patch:
        at_step(patch, 7, poison)
        with pytest.raises(RunError, match="at step 7"):
            run(tiny, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-4"]
    run(tiny, tmp_path / "run", resume=True)
    run(tiny, tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_the_folder_holds_what_a_stranger_needs_and_no_pickled_arguments(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["output"]["tensorboard"] = True
    summary = run(tiny, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "summary.json", "README.md"}
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert summary["parameters"]["total"] == sum(tensor.numel() for tensor in weights(tmp_path / "run").values())
    assert f"{summary['parameters']['total']:,} parameters" in (tmp_path / "run" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["tokens"] == summary["tokens"] >= 4500


def test_a_folder_with_a_run_is_refused_unless_told_otherwise(tiny: dict[str, Any], tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tiny, tmp_path / "run")
    assert run(tiny, tmp_path / "run", overwrite=True)["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("model", "init_from", "nowhere", "neither a folder nor a shipped checkpoint"),
        ("data", "lengths", [0, 8], "no story of qa1 fits"),
        ("data", "background", "nowhere", "no such folder"),
    ],
)
def test_a_recipe_that_cannot_run_does_not_cost_the_run_it_would_overwrite(
    tiny: dict[str, Any], tmp_path: Path, section: str, key: str, value: Any, said: str
) -> None:
    run(tiny, tmp_path / "run")
    tiny[section][key] = value
    with pytest.raises(ConfigError, match=said):
        run(tiny, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_finished_run_resumes_to_its_own_end_and_goes_on_with_a_larger_budget(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["optimisation"]["schedule"] = "constant"
    first = run(tiny, tmp_path / "run")
    before = weights(tmp_path / "run")
    again = run(tiny, tmp_path / "run", resume=True)
    assert (again["steps"], again["stop_reason"]) == (first["steps"], "max_tokens")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    tiny["optimisation"]["max_tokens"] = 6500
    assert run(tiny, tmp_path / "run", resume=True)["steps"] > first["steps"]
    run(tiny, tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_resuming_with_another_recipe_is_refused_by_key(tiny: dict[str, Any], tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    tiny["optimisation"]["learning_rate"] = 0.5
    with pytest.raises(ConfigError, match=r"another optimisation\.learning_rate: the run has 0\.001"):
        run(tiny, tmp_path / "run", resume=True)


def test_resuming_falls_back_to_the_newest_whole_checkpoint(tiny: dict[str, Any], tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    whole = weights(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    (newest / "optimizer.pt").unlink()
    run(tiny, tmp_path / "run", resume=True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    for optimiser in (tmp_path / "run").rglob("optimizer.pt"):
        optimiser.unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing"):
        run(tiny, tmp_path / "run", resume=True)


def test_nothing_to_resume_is_said(tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to resume"):
        run(tiny, tmp_path / "empty", resume=True)


def test_a_cost_of_writing_is_logged_and_lowers_how_much_is_written(tiny: dict[str, Any], tmp_path: Path) -> None:
    rates = []
    tiny["model"]["kind"] = "lm2"
    tiny["optimisation"].update(learning_rate=0.01, schedule="constant")
    for cost in (1e-9, 10.0):
        memory = {"num_slots": 4, "slot_dim": 8, "num_memory_heads": 2, "segment_length": 16, "attention_span": 16}
        tiny["model"]["lm2"] = memory | {"skip_gate": True, "write_cost": cost}
        train(check_recipe(tiny), tmp_path / str(cost), show_progress=False)
        log = (tmp_path / str(cost) / "training_log.jsonl").read_text().splitlines()
        rates.append(json.loads(log[-1])["memory/write_rate"])
    assert 0 < rates[1] < rates[0] - 0.05 < 1


def test_a_cost_of_writing_counts_in_contexts_with_filler_only(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"]["lengths"] = [0]
    tiny["model"]["kind"] = "lm2"
    for cost in (0.0, 10.0):
        tiny["model"]["lm2"] = LM2 | {"skip_gate": True, "write_cost": cost}
        run(tiny, tmp_path / str(cost))
    assert_same_weights(tmp_path / "0.0", tmp_path / "10.0")


def test_minutes_end_a_run_cleanly(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["optimisation"].update(max_tokens=None, max_minutes=0.02)
    summary = run(tiny, tmp_path / "run")
    assert summary["stop_reason"] == "max_minutes"
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_run_can_stop_when_everything_is_learned(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"]["curriculum"].update(stop_when_learned=True, window=4)
    tiny["optimisation"]["max_tokens"] = 10**6
    summary = run(tiny, tmp_path / "run")
    assert summary["stop_reason"] == "learned"
    assert [stage["length"] for stage in summary["stages"]] == [0, 64, 96]


@pytest.fixture(scope="module")
def short_run(tiny_base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains a few steps with one key changed."""

    def train_with(section: str = "", key: str = "", value: Any = None) -> Path:
        raw = copy.deepcopy(tiny_base)
        raw["data"]["curriculum"].update(start_stage=2)
        raw["optimisation"].update(max_tokens=1800, max_grad_norm=0.5)
        raw["evaluation"]["samples"] = 0
        if section:
            section_of(raw, section)[key] = value
        folder = tmp_path_factory.mktemp("short")
        run(raw, folder / "run")
        return folder / "run"

    return train_with


@pytest.fixture(scope="module")
def usual(short_run: Callable[..., Path]) -> Path:
    return short_run()


def section_of(raw: dict[str, Any], path: str) -> dict[str, Any]:
    for part in path.split("."):
        raw = raw[part]
    return raw


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "tasks", {"qa1": 1.0, "qa6": 2.0}),
        ("data", "questions_per_story", 1),
        ("data", "loss_on", "all"),
        ("data", "loss_on", "facts"),
        ("data.curriculum", "share_shorter", 0.9),
        ("data.curriculum", "start_stage", 0),
        ("optimisation", "learning_rate", 2e-3),
        ("optimisation", "weight_decay", 0.5),
        ("optimisation", "betas", [0.8, 0.98]),
        ("optimisation", "warmup_steps", 0),
        ("optimisation", "schedule", "constant"),
        ("optimisation", "floor", 1.0),
        ("optimisation", "max_grad_norm", 0.1),
        ("optimisation", "batch_tokens", 400),
        ("optimisation", "dtype", "bfloat16"),
        ("model.base", "conv_L_cache", 4),
    ],
)
def test_every_option_changes_what_is_learned(
    short_run: Callable[..., Path], usual: Path, section: str, key: str, value: Any
) -> None:
    with pytest.raises(AssertionError):
        assert_same_weights(usual, short_run(section, key, value))


def test_training_lowers_the_loss(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["data"].update(tasks=["qa1"], lengths=[0])
    tiny["optimisation"].update(learning_rate=3e-3, max_tokens=60_000, batch_tokens=1024)
    run(tiny, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] > 4
    assert log[-1]["loss"] < 1.2, "below this, the six places and the end of the answer are known"


def test_the_learning_rate_warms_up_and_falls_to_its_floor(tiny: dict[str, Any]) -> None:
    options = check_recipe(tiny).optimisation.model_copy(update={"warmup_steps": 10, "floor": 0.1})
    assert learning_rate_factor(options, 0, 0.0) == pytest.approx(0.1)
    for schedule, middle in (("constant", 1.0), ("linear", 0.55), ("cosine", 0.55), ("trapezoid", 1.0)):
        options = options.model_copy(update={"schedule": schedule})
        assert learning_rate_factor(options, 9, 0.0) == pytest.approx(1.0)
        assert learning_rate_factor(options, 99, 0.5) == pytest.approx(middle)
        end = 1.0 if schedule == "constant" else 0.1
        assert learning_rate_factor(options, 99, 1.0) == pytest.approx(end)
