"""Runs on two processes: the same training as on one, stopped and resumed together, refused together."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mnemon.errors import BackendUnavailable, ConfigError, PeerError
from mnemon.files import RUN_MARKER
from mnemon.training import train
from mnemon.training.build import build_model
from mnemon.training.distributed import (
    Processes,
    check_engine,
    check_sharding,
    check_shared_folder,
    decoder_layer_classes,
    engine_in_use,
    explain_lost_peer,
    joined_processes,
)
from mnemon.training.recipe_io import check_recipe
from mnemon.training.trainer import training_arguments

LM2 = {"num_slots": 4, "slot_dim": 16, "num_memory_heads": 2, "segment_length": 32, "attention_span": 32}
PROGRAM = Path(__file__).with_name("several_processes.py")


def launched(*words: str | Path, stop_when: Callable[[], bool] | None = None) -> str:
    """Run a Python program on two processes, terminated as soon as `stop_when` holds; return its error text."""
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if stop_when is not None:
            deadline = time.monotonic() + 120
            while not stop_when() and time.monotonic() < deadline:
                time.sleep(0.1)
            launcher.terminate()
        _, error = launcher.communicate(timeout=180)
    finally:
        launcher.terminate()  # the launcher takes its processes with it
        launcher.wait(60)
    assert (launcher.returncode == 0) is (stop_when is None), error[-4000:]
    return error


@pytest.fixture(scope="module")
def recipes(tiny_base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a plain recipe, and one with a memory and everything that must still fit together."""
    plain = copy.deepcopy(tiny_base)
    lm2 = copy.deepcopy(tiny_base)
    lm2["model"].update(kind="lm2", lm2=LM2)
    lm2["optimisation"].update(gradient_accumulation=2, gradient_checkpointing=True)
    lm2["data"]["loss_on"] = "all"
    return {"plain": plain, "lm2": lm2}


@pytest.fixture(scope="module")
def folder(recipes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the program on two processes, the same recipes on one, and return the folder of all runs."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "recipes.json").write_text(json.dumps(recipes))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipes["plain"]))
    launched(PROGRAM, folder)
    for name, raw in recipes.items():
        train(check_recipe(raw), folder / f"{name}-alone", show_progress=False)
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """Return what each process saw."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "lm2"])
def test_two_processes_train_as_one_does(folder: Path, seen: list[dict[str, Any]], name: str) -> None:
    alone, together = log(folder / f"{name}-alone"), log(folder / name)
    assert together[0]["engine"] == seen[0][name]["engine"] == "ddp"
    assert (alone[0]["engine"], alone[0]["processes"]) == ("single process", 1)
    for one, two in zip(alone, together, strict=True):
        for key in ("step", "tokens", "answers", "stage", "stage_accuracy"):
            assert one[key] == two[key]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    # The order of a sum differs, which is 1e-7 of a gradient, and up to a learning rate of 1e-3 where AdamW divides a
    # gradient near zero by its own size. Seen: 2e-6 after all steps.
    first, second = weights(folder / f"{name}-alone"), weights(folder / name)
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=5e-5)


@pytest.mark.slow
def test_a_stop_asked_of_one_process_stops_all_and_resumes_to_the_same_bits(
    folder: Path, seen: list[dict[str, Any]]
) -> None:
    for process in seen:
        assert (process["cut"]["stop_reason"], process["cut"]["steps"]) == ("interrupted", 6)
        assert process["resumed"]["steps"] == process["lm2"]["steps"] > 6
    whole, resumed = weights(folder / "lm2"), weights(folder / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert seen[0]["resumed"]["validation"] == seen[0]["lm2"]["validation"] != {}
    assert seen[1]["lm2"]["validation"] == {}


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_on_one_process_stops_all_with_one_line(
    folder: Path, seen: list[dict[str, Any]]
) -> None:
    assert seen[0]["spoiled"]["error"] == "RunError"
    assert "the loss became nan at step 6" in seen[0]["spoiled"]["message"]
    assert seen[1]["spoiled"]["error"] == "PeerError"
    assert [path.name for path in (folder / "spoiled" / "checkpoints").iterdir()] == ["checkpoint-4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "error", "said"),
    [
        ("occupied", "ConfigError", "already holds a run"),
        ("fsdp", "BackendUnavailable", "needs one CUDA GPU per process"),
        ("fsdp forced", "BackendUnavailable", "accelerate runs 'ddp'"),
    ],
)
def test_what_is_refused_is_refused_by_all_and_explained_by_the_first(
    seen: list[dict[str, Any]], run: str, error: str, said: str
) -> None:
    assert seen[0][run]["error"] == error
    assert said in seen[0][run]["message"]
    assert seen[1][run]["error"] == "PeerError"


@pytest.mark.slow
def test_a_process_whose_peer_is_gone_says_so(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["left alone"]["error"] == "PeerError"
    assert "another process of the run is gone" in seen[0]["left alone"]["message"]


def test_a_fault_of_another_kind_is_not_blamed_on_a_lost_process() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), explain_lost_peer():
        raise RuntimeError("shapes differ")


@pytest.mark.slow
def test_only_the_first_process_prints(seen: list[dict[str, Any]]) -> None:
    summary = json.loads(seen[0]["command"]["out"])
    assert (summary["engine"], summary["processes"]) == ("ddp", 2)
    assert seen[1]["command"] == {"code": 0, "out": "", "err": ""}
    assert [process["mistake"]["code"] for process in seen] == [2, 2]
    assert seen[0]["mistake"]["err"].count("\n") == 1
    assert "did you mean optimisation.learning_rate" in seen[0]["mistake"]["err"]
    assert seen[1]["mistake"]["err"] == ""


@pytest.mark.slow
def test_a_memory_in_pieces_has_the_gradients_of_the_whole(seen: list[dict[str, Any]]) -> None:
    assert max(process["sharded gradients"] for process in seen) < 1e-12


@pytest.mark.slow
def test_a_terminated_launcher_leaves_a_run_that_can_be_resumed(recipes: dict[str, Any], tmp_path: Path) -> None:
    raw = copy.deepcopy(recipes["plain"])
    raw["optimisation"].update(max_tokens=10**8, schedule="constant")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    run = tmp_path / "run"
    error = launched(
        "-m", "mnemon", "train", tmp_path / "recipe.yaml", "--output", run,
        stop_when=lambda: bool(list(run.glob("checkpoints/checkpoint-*"))),
    )  # fmt: skip
    assert error.count("go on with --resume") == 1
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["stop_reason"], summary["processes"]) == ("interrupted", 2)
    raw["optimisation"]["max_tokens"] = summary["tokens"] + 1000
    assert train(check_recipe(raw), run, resume=True, show_progress=False)["steps"] > summary["steps"]


def test_one_process_agrees_with_itself_and_keeps_its_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_processes() as processes:
        assert processes == Processes(0, 1)
    assert processes.sum([1.5, 2.0]) == [1.5, 2.0]
    assert processes.gather("value") == ["value"]
    assert processes.from_main(lambda: 3) == 3
    with pytest.raises(ConfigError, match="own"), processes.together():
        raise ConfigError("own")
    fault = ConfigError("seen by all")
    assert processes.stop_all(fault) is fault
    assert isinstance(Processes(1, 2).stop_all(fault), PeerError)


def test_processes_that_were_promised_and_cannot_be_reached_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2.*start them with torchrun"), joined_processes():
        pass


def test_sharding_is_refused_where_there_is_nothing_to_shard_over(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["optimisation"]["sharding"] = "fsdp"
    recipe = check_recipe(tiny)
    with pytest.raises(ConfigError, match="there is one process to shard over"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(BackendUnavailable, match="one CUDA GPU per process"):
        check_sharding(recipe, False, Processes(0, 2))
    check_sharding(recipe, True, Processes(0, 2))
    tiny["model"].update(kind="lm2", lm2=LM2, base=None, from_base="a-decoder", freeze_base=True)
    with pytest.raises(ConfigError, match=r"cannot be combined with model\.freeze_base"):
        check_sharding(check_recipe(tiny), True, Processes(0, 2))


def test_another_engine_than_the_recipes_is_refused(tiny: dict[str, Any]) -> None:
    options = check_recipe(tiny).optimisation
    network = torch.nn.Linear(2, 2)
    assert engine_in_use("NO", network) == "single process"
    assert engine_in_use("MULTI_CPU", network) == "multi_cpu"
    check_engine(options, "single process", Processes())
    check_engine(options, "ddp", Processes(0, 2))
    for engine in ("single process", "fsdp", "multi_cpu"):
        with pytest.raises(BackendUnavailable, match=f"accelerate runs '{engine}'"):
            check_engine(options, engine, Processes(0, 2))


@pytest.mark.parametrize("kind", ["plain", "lm2"])
def test_fsdp_is_told_the_decoders_blocks(recipes: dict[str, Any], tmp_path: Path, kind: str) -> None:
    recipe = check_recipe(recipes[kind])
    model = build_model(recipe, 420)
    assert decoder_layer_classes(model) == ["Lfm2DecoderLayer"]
    sharded = recipe.model_copy(update={"optimisation": recipe.optimisation.model_copy(update={"sharding": "fsdp"})})
    arguments = training_arguments(sharded, tmp_path, model)
    assert arguments.fsdp_plugin_args is not None
    assert arguments.fsdp_plugin_args["fsdp_version"] == 2
    assert arguments.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "Lfm2DecoderLayer"
    assert training_arguments(recipe, tmp_path, model).fsdp_plugin_args is None


def test_a_process_that_does_not_see_the_runs_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"process 0 does not see the run's folder .*all machines share"):
        check_shared_folder(tmp_path, Processes())
    (tmp_path / RUN_MARKER).touch()
    check_shared_folder(tmp_path, Processes())
