import errno
import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mnemon.errors import CheckpointError, RunError
from mnemon.training import checkpoints

REQUIRED = checkpoints.required_files(Path("of one process"))


def write(folder: Path, step: int, content: str = "x") -> Path:
    with checkpoints.staged(folder, step) as stage:
        inside = stage / f"checkpoint-{step}"
        inside.mkdir()
        for name in REQUIRED:
            (inside / name).write_text(f"{content} {name} {step}")
    return folder / f"checkpoint-{step}"


def test_the_newest_whole_checkpoint_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, step)
    assert checkpoints.newest_whole(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize("name", [*REQUIRED, checkpoints.MANIFEST])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.write_bytes(path.read_bytes()[:-2] + b"??")
    assert checkpoints.newest_whole(tmp_path).name == "checkpoint-1"
    assert name in capsys.readouterr().err


def test_a_checkpoint_without_optimiser_is_refused_even_if_its_manifest_agrees(tmp_path: Path) -> None:
    with checkpoints.staged(tmp_path, 1) as stage:
        (stage / "checkpoint-1").mkdir()
        (stage / "checkpoint-1" / "model.safetensors").write_text("x")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing"):
        checkpoints.newest_whole(tmp_path)


def test_an_empty_folder_says_how_to_start_again(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--overwrite"):
        checkpoints.newest_whole(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
        SafetensorError("I/O error: No space left on device"),
    ],
)
def test_a_writing_that_fails_leaves_the_earlier_checkpoint(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path, 1)

    def write_half() -> None:
        with checkpoints.staged(tmp_path, 2) as stage:
            (stage / "checkpoint-2").mkdir()
            raise error

    with pytest.raises((KeyboardInterrupt, RunError)):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoints.fault_of(tmp_path / "checkpoint-1") is None


def test_old_checkpoints_and_leftovers_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / ".writing-9").mkdir()
    checkpoints.remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_step_written_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, 1, "old")
    path = write(tmp_path, 1, "new")
    assert (path / "optimizer.pt").read_text().startswith("new")
    assert checkpoints.fault_of(path) is None


def test_a_checkpoint_of_several_processes_needs_the_random_state_of_each(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 1)
    (checkpoint / checkpoints.RUN_STATE).write_text(json.dumps({"processes": 2, "sharding": "none"}))
    names = checkpoints.required_files(checkpoint)
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= set(names)
    assert "rng_state.pth" not in names
    (checkpoint / checkpoints.RUN_STATE).write_text(json.dumps({"processes": 2, "sharding": "fsdp"}))
    assert {"pytorch_model_fsdp.bin", "optimizer.bin"} <= set(checkpoints.required_files(checkpoint))
