"""What the README claims about the shipped models, on a few fresh questions; and how they are shipped."""

import json
import runpy
import shutil

import pytest

from mnemon.evaluation.babilong import evaluate_babilong
from mnemon.models.loading import load_model, shipped_checkpoints
from mnemon.training import load_recipe


def right_answers(model, tokenizer, **generate_kwargs) -> int:
    result = evaluate_babilong(
        model,
        tokenizer,
        tasks=("qa1",),
        lengths=("1k",),
        num_samples=16,
        seed=77,
        background="stdlib",
        layout="short",
        generate_kwargs=generate_kwargs,
        label="model",
    )
    return sum(result.cells[0].marks("exact"))


def test_the_shipped_lm2_answers_from_its_memory_and_not_without_it():
    model, tokenizer = load_model("babilong-tiny-lm2")
    assert right_answers(model, tokenizer) >= 14
    assert right_answers(model, tokenizer, knock_out_memory=True) <= 10


@pytest.fixture(scope="module")
def update_checkpoints(repository):
    return runpy.run_path(str(repository / "scripts" / "update_checkpoints.py"))["main"]


def test_a_finished_run_becomes_a_checkpoint_under_another_name(update_checkpoints, tmp_path):
    run = shipped_checkpoints()["babilong-tiny-plain"]
    assert update_checkpoints([f"other={run}", "--root", str(tmp_path)]) == 0
    made = tmp_path / "src" / "mnemon" / "checkpoints" / "other"
    assert (made / "README.md").read_text().count("# other\n") == 1
    assert load_recipe(made / "recipe.yaml").name == json.loads((made / "summary.json").read_text())["name"] == "other"
    assert {path.name for path in made.iterdir()} == {path.name for path in run.iterdir()}
    assert (made / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_run_that_is_not_finished_changes_nothing(update_checkpoints, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(shipped_checkpoints()["babilong-tiny-plain"], run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "stop_reason": "interrupted"}))
    root = tmp_path / "root"
    for bad in (f"other={run}", "other=nowhere", "other", "a/b=x"):
        assert update_checkpoints([bad, "--root", str(root)]) == 2
        assert capsys.readouterr().err.startswith("update_checkpoints: error:")
    assert not root.exists()
