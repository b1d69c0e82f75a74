"""What is run, what is not run again, and what is refused; the training itself is made up here."""

import itertools
import json
import shlex
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mnemon.errors import ConfigError
from mnemon.studies import execution
from mnemon.studies.execution import alone_in, execute, is_finished, refuse_untrained
from mnemon.studies.mom_mqar import MomMqar
from mnemon.studies.order import Order
from mnemon.studies.planning import base_recipe, choose_variants, plan_runs
from mnemon.studies.results import reproduce
from mnemon.studies.study import Json, PlannedRun
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import save_recipe


def planned(*changes: str, samples: int | None = None, seeds: int = 1) -> tuple[PlannedRun, ...]:
    order = Order("mom-mqar", "tiny", only=("gla.single", "gla.mom"), changes=changes, samples=samples)
    study, scale = order.resolve()
    variants = choose_variants(study, scale, base_recipe(study, scale, changes), order.only)
    return plan_runs(study, scale, variants, seeds, changes)


class Measuring:
    """Stands for the study: counts what it measures."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def measure(self, run: PlannedRun, folder: Path) -> Json:
        self.measured.append(run.name)
        return {"cells": []}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the training by one that writes the files of a finished run; return how it was called."""
    found: list[dict[str, Any]] = []

    def train(recipe: Recipe, folder: Path, **options: Any) -> Json:
        found.append({"name": recipe.name, **options})
        folder.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, folder / "recipe.yaml")
        summary = {"stop_reason": "max_tokens", "validation": {"16": {}}, "tokens": 2048, "minutes": 0.1}
        (folder / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.setattr(execution, "train", train)
    return found


Run = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def execute_all(runs: tuple[PlannedRun, ...]) -> list[str]:
        study = Measuring()
        execute(study, runs, tmp_path, 1, lambda text: None)  # type: ignore[arg-type]
        return study.measured

    return execute_all


def test_what_is_finished_is_neither_trained_nor_measured_again(calls: list[dict[str, Any]], run: Run) -> None:
    assert len(run(planned())) == 2
    assert run(planned()) == []
    assert len(calls) == 2


def test_another_seed_adds_runs_and_repeats_none(calls: list[dict[str, Any]], run: Run) -> None:
    run(planned())
    assert [name.rsplit("/", 1)[1] for name in run(planned(seeds=2))] == ["seed-1", "seed-1"]
    assert len(calls) == 4


def test_more_samples_are_measured_again_without_training(calls: list[dict[str, Any]], run: Run) -> None:
    run(planned())
    assert len(run(planned(samples=9))) == 2
    assert len(calls) == 2


def test_an_interrupted_run_goes_on_from_its_checkpoint(calls: list[dict[str, Any]], run: Run, tmp_path: Path) -> None:
    first = planned()[0]
    (first.folder(tmp_path) / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    run((first,))
    assert calls == [{"name": first.recipe.name, "resume": True, "overwrite": False, "show_progress": False}]


def test_a_run_that_never_saved_begins_again(calls: list[dict[str, Any]], run: Run, tmp_path: Path) -> None:
    first = planned()[0]
    first.folder(tmp_path).mkdir(parents=True)
    run((first,))
    assert (calls[0]["resume"], calls[0]["overwrite"]) == (False, True)


def test_a_run_that_was_stopped_before_its_validation_is_not_finished(
    calls: list[dict[str, Any]], run: Run, tmp_path: Path
) -> None:
    first = planned()[0]
    run((first,))
    summary = first.folder(tmp_path) / "summary.json"
    summary.write_text(json.dumps({"stop_reason": "max_tokens", "validation": {}}))
    assert not is_finished(first, tmp_path)
    summary.write_text(json.dumps({"stop_reason": "interrupted", "validation": {"16": {}}}))
    assert not is_finished(first, tmp_path)


def test_a_run_of_another_recipe_is_refused_and_named(calls: list[dict[str, Any]], run: Run) -> None:
    run(planned())
    with pytest.raises(ConfigError, match=r"was begun with data.vocab_size 64, now it is 80; use --overwrite"):
        run(planned("data.vocab_size=80"))
    assert len(calls) == 2


def test_how_a_run_is_logged_may_change(calls: list[dict[str, Any]], run: Run) -> None:
    run(planned())
    assert run(planned("output.log_every_steps=7", "optimisation.threads=2", "data.workers=1")) == []


def test_an_interruption_ends_the_study(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "train", lambda *args, **options: {"stop_reason": "interrupted"})
    with pytest.raises(KeyboardInterrupt):
        run(planned())


def test_launched_runs_have_to_be_there(calls: list[dict[str, Any]], run: Run, tmp_path: Path) -> None:
    run(planned()[:1])
    with pytest.raises(ConfigError, match=r"1 of 2 runs .* launched first, such as gla.mom"):
        refuse_untrained(planned(), tmp_path)
    run(planned())
    refuse_untrained(planned(), tmp_path)


def test_two_processes_cannot_work_on_one_study(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "study"),
        pytest.raises(ConfigError, match="another process works on this study"),
        alone_in(tmp_path / "study"),
    ):
        pass
    with alone_in(tmp_path / "study"):
        pass


def test_launched_runs_are_measured_where_they_lie_and_never_trained_or_deleted(
    calls: list[dict[str, Any]], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = replace(MomMqar.scales["tiny"], launched=True)
    monkeypatch.setattr(MomMqar, "scales", {"tiny": scale})
    cells = [{"length": 16, "num_pairs": 2, "right_per_sample": [1, 2]}]
    monkeypatch.setattr(MomMqar, "measure", lambda study, run, folder: {"cells": cells})
    order, root = Order("mom-mqar", "tiny", only=("gla.single", "gla.mom")), tmp_path / "study"
    with pytest.raises(ConfigError, match="2 of 2 runs of this scale have to be launched first"):
        reproduce(order, root)
    assert not root.exists()
    for planned_run in planned():
        execution.train(planned_run.recipe, planned_run.folder(root), tokens=0)
    launched = len(calls)
    with pytest.raises(ConfigError, match="--overwrite would delete runs that were launched"):
        reproduce(order, root, overwrite=True)
    with pytest.raises(ConfigError, match="leave out --tune"):
        reproduce(order, root, tune=(0.1,))
    results = reproduce(order, root)
    assert [variant["mean"]["accuracy"]["mean"] for variant in results["variants"]] == [0.75, 0.75]
    assert len(calls) == launched


@pytest.mark.parametrize(("name", "size"), [("lm2-table1", "tiny"), ("lm2-ablation", "tiny"), ("mom-mqar", "small")])
def test_a_study_that_is_kept_with_its_page_goes_on_by_the_command_it_names(name, size, tmp_path):
    kept = Path(__file__).parents[2] / "docs" / "results" / "runs" / f"{name}.tar.gz"
    with tarfile.open(kept) as archive:
        archive.extractall(tmp_path, filter="data")
    words = shlex.split(json.loads((tmp_path / "results.json").read_text())["command"])
    changes = tuple(value for option, value in itertools.pairwise(words) if option == "--set")
    study, scale = Order(name, size).resolve()
    variants = choose_variants(study, scale, base_recipe(study, scale, changes), ())
    seeds = int(words[words.index("--seeds") + 1]) if "--seeds" in words else scale.seeds
    runs = plan_runs(study, scale, variants, seeds, changes)
    finished = {run.folder(tmp_path) for run in runs if is_finished(run, tmp_path)}
    assert finished == {path.parent for path in tmp_path.glob("runs/*/*/*/measures.json")}
    assert finished
