"""Options that change how a step is computed, not what it computes: precision, recomputation, compilation."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

from mnemon.errors import ConfigError
from mnemon.layers.joint_banks import JointBanks
from mnemon.layers.memory_bank import MemoryBank, WriteStatistics, rms_normalise
from mnemon.training import train
from mnemon.training.build import build_model
from mnemon.training.recipe_io import check_recipe
from mnemon.training.trainer import recompute_activations, training_arguments

LM2 = {"num_slots": 4, "slot_dim": 16, "num_memory_heads": 2, "segment_length": 32, "attention_span": 32}


@pytest.fixture
def short(tiny: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe of a few steps at the full length."""
    tiny["data"]["curriculum"].update(start_stage=2)
    tiny["optimisation"].update(max_tokens=1800)
    tiny["evaluation"]["samples"] = 0
    tiny["output"]["log_every_steps"] = 1
    return tiny


def run(raw: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Train and return the log."""
    train(check_recipe(raw), folder, show_progress=False)
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def with_options(raw: dict[str, Any], **options: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    raw["optimisation"].update(options)
    return raw


@pytest.fixture(params=[True, False], ids=["joined banks", "banks alone"])
def gate_dtypes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[set[tuple[str, torch.dtype]]]:
    """Collect (what, dtype) of everything a bank carries or gates with, in every update."""
    seen: set[tuple[str, torch.dtype]] = set()
    prepare, update, update_alone = JointBanks.prepare_update, JointBanks.update, MemoryBank.update

    def watch(**tensors: torch.Tensor | None) -> None:
        seen.update((name, tensor.dtype) for name, tensor in tensors.items() if tensor is not None)

    def prepared(self: JointBanks, statistics: Sequence[WriteStatistics]) -> Any:
        for block in statistics:
            watch(**block._asdict())
        return prepare(self, statistics)

    def updated(self: JointBanks, block: int, bank: torch.Tensor, written: Any) -> Any:
        new, gates = update(self, block, bank, written)
        watch(bank=bank, new_bank=new, **gates._asdict())
        return new, gates

    def updated_alone(self: MemoryBank, bank: torch.Tensor, statistics: WriteStatistics) -> Any:
        new, gates = update_alone(self, bank, statistics)
        watch(bank=bank, new_bank=new, **statistics._asdict(), **gates._asdict())
        return new, gates

    if request.param:
        # A single bank is joined with others only where every segment is a call of its own.
        monkeypatch.setattr("mnemon.models.modeling_lm2._CALL_LENGTH", 1)
        monkeypatch.setattr(JointBanks, "prepare_update", prepared)
        monkeypatch.setattr(JointBanks, "update", updated)
    else:
        monkeypatch.setattr("mnemon.models.memory_segments.can_be_joined", lambda banks: False)
        monkeypatch.setattr(MemoryBank, "update", updated_alone)
    yield seen
    monkeypatch.undo()


def test_in_bfloat16_the_memory_stays_in_float32_and_the_loss_close(
    short: dict[str, Any], tmp_path: Path, gate_dtypes: set[tuple[str, torch.dtype]]
) -> None:
    short["model"].update(kind="lm2", lm2=LM2)
    exact = run(short, tmp_path / "exact")
    gate_dtypes.clear()
    rough = run(with_options(short, dtype="bfloat16"), tmp_path / "rough")
    assert {name for name, _ in gate_dtypes} >= {"bank", "new_bank", "total", "value", "input_gate", "forget_gate"}
    assert {dtype for _, dtype in gate_dtypes} == {torch.float32}
    for one, two in zip(exact, rough, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=5e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)
    assert exact[0]["loss"] != rough[0]["loss"]


def test_autocast_leaves_the_gates_and_statistics_of_a_bank_exact() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(32, 4, 16, 2, retention=0.9)
    with torch.no_grad():
        for parameter, value in bank.initial_values():
            parameter.copy_(value)
    state, residual = torch.randn(2, 4, 16), torch.randn(2, 8, 32)
    segment = bank.open_segment(rms_normalise(state))
    empty = bank.empty_statistics(2, residual)
    statistics = bank.gather(residual, torch.arange(8)[None], None, segment, empty)
    new, gates = bank.update(state, statistics)
    with torch.autocast("cpu", torch.bfloat16):
        same, same_gates = bank.update(state, statistics)
        close = bank.gather(residual, torch.arange(8)[None], None, segment, empty)
    assert torch.equal(same, new)
    assert torch.equal(same_gates.forget_gate, gates.forget_gate)
    assert close.value.dtype == torch.float32
    # The projections are rounded to 8 bits, the sum over tokens is not: it keeps more than 8 bits of its own.
    assert not torch.equal(close.value, close.value.bfloat16().float())


def test_recomputing_activations_runs_the_blocks_again_and_changes_no_weight(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = Lfm2MLP.forward
    monkeypatch.setattr(Lfm2MLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    steps = run(short, tmp_path / "kept")[-1]["step"]
    kept_calls = len(calls)
    assert kept_calls == 2 * steps
    run(with_options(short, gradient_checkpointing=True), tmp_path / "recomputed")
    assert len(calls) - kept_calls == 2 * kept_calls
    kept, recomputed = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "recomputed"))
    for name in kept:
        torch.testing.assert_close(recomputed[name], kept[name], rtol=0, atol=1e-6)


def test_the_switch_reaches_every_block(short: dict[str, Any]) -> None:
    recipe = check_recipe(short)
    model = build_model(recipe, 420)
    switches = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert switches
    assert not any(module.gradient_checkpointing for module in switches)
    recompute_activations(model)
    assert all(module.gradient_checkpointing for module in switches)


def test_a_model_that_cannot_recompute_is_refused_in_one_line(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(check_recipe(short), 420)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"optimisation\.gradient_checkpointing: .*; set it to false"):
        recompute_activations(model)


def test_compile_goes_to_the_model_if_it_knows_how_and_to_torch_otherwise(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = check_recipe(with_options(short, compile=True))
    model = build_model(recipe, 420)
    assert training_arguments(recipe, tmp_path, model).torch_compile
    assert not training_arguments(check_recipe(short), tmp_path, model).torch_compile
    compiled: list[PreTrainedModel] = []
    monkeypatch.setattr(type(model), "compile_for_training", lambda self: compiled.append(self), raising=False)
    assert not training_arguments(recipe, tmp_path, model).torch_compile
    train(recipe, tmp_path / "run", show_progress=False)
    assert len(compiled) == 1


@dataclass
class OutputWithDiagnostics(CausalLMOutputWithPast):
    """What a model with a memory may return."""

    diagnostics: dict[str, torch.Tensor] | None = None


def test_diagnostics_of_the_model_are_averaged_into_the_log(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short["output"].update(log_every_steps=2, tensorboard=True)
    model_class = type(build_model(check_recipe(short), 420))
    forward, calls = model_class.forward, iter(range(100))

    def stub(self: Any, *args: Any, **kwargs: Any) -> OutputWithDiagnostics:
        output = forward(self, *args, **kwargs)
        number = next(calls)
        found = {"forget_gate": torch.tensor(float(number)), "broken": torch.tensor(float("nan"))}
        return OutputWithDiagnostics(logits=output.logits, diagnostics=found)

    monkeypatch.setattr(model_class, "forward", stub)
    written: list[str] = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", lambda self, name, *_: written.append(name))
    log = run(short, tmp_path / "run")
    assert [entry["memory/forget_gate"] for entry in log[:2]] == [0.5, 2.5]
    assert log[0]["memory/broken"] is None
    assert "memory/forget_gate" in written
    assert "memory/broken" not in written


def test_a_model_without_diagnostics_logs_none(short: dict[str, Any], tmp_path: Path) -> None:
    assert not [key for entry in run(short, tmp_path / "run") for key in entry if key.startswith("memory/")]


def test_a_trainer_of_one_process_names_its_engine(short: dict[str, Any], tmp_path: Path) -> None:
    first, *others = run(short, tmp_path / "run")
    assert (first["engine"], first["processes"]) == ("single process", 1)
    assert not any("engine" in entry for entry in others)


def test_the_memory_of_an_lm2_reports_in_the_steps_that_are_logged(short: dict[str, Any], tmp_path: Path) -> None:
    short["model"].update(kind="lm2", lm2=LM2)
    short["output"]["log_every_steps"] = 2
    first = run(short, tmp_path / "run")[0]
    assert 0 < first["memory/forget_gate"] < 1
    assert first["memory/bank_rms"] > 0
