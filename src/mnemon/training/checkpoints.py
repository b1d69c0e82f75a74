"""Checkpoints that are whole or not there: written aside, completed by a manifest, then renamed.

A checkpoint is a folder `checkpoint-<step>` with the files of Hugging Face's Trainer, our run state, and
`manifest.json` (size and sha256 of every file), which is written last. Reading verifies the manifest and falls back to
the newest whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mnemon.errors import CheckpointError, MnemonError, RunError
from mnemon.files import atomic_write_json, explain_disk_errors
from mnemon.training.distributed import Processes

MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"
_ALMOST_FULL = 16 * 2**20


@contextmanager
def staged(folder: Path, step: int, processes: Processes = Processes()) -> Iterator[Path]:  # noqa: B008 (frozen)
    """Give a temporary folder to write a checkpoint into; when the block ends, seal it and put it in place.

    Args:
        folder: folder of all checkpoints.
        step: optimisation steps done.
        processes: the processes of the run, which all write into the folder.

    Yields:
        The temporary folder; Hugging Face's Trainer makes `checkpoint-<step>` inside it.

    Raises:
        RunError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    stage = folder / f".writing-{step}"
    try:
        processes.from_main(lambda: _open(stage))
        with processes.together(), explain_write_errors(folder):
            yield stage
        processes.from_main(lambda: _close(stage, step))
    finally:
        if processes.is_main:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn whatever torch or safetensors raises when it cannot write weights into one clear line.

    Both hide the operating system's error code, so the space left on the disk tells whether it is full.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    try:
        with explain_disk_errors(folder):
            yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, MnemonError):
            raise
        if shutil.disk_usage(folder).free < _ALMOST_FULL:
            raise RunError(
                f"{folder}: the disk is full; free some space and run again (earlier files are intact)"
            ) from error
        raise RunError(f"{folder}: cannot be written ({str(error).splitlines()[0]}); choose another place") from error


def newest_whole(folder: Path) -> Path:
    """Return the newest checkpoint that is complete and unchanged; say on stderr which ones were passed over.

    Args:
        folder: folder of all checkpoints.

    Raises:
        CheckpointError: there is none; the message says what is wrong with the newest.
    """
    found = _by_step(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint to resume from; start again with --overwrite")
    faults: list[str] = []
    for checkpoint in reversed(found):
        fault = fault_of(checkpoint)
        if fault is None:
            for name in faults:
                print(f"passed over a damaged checkpoint: {name}", file=sys.stderr)
            return checkpoint
        faults.append(f"{checkpoint.name}: {fault}")
    raise CheckpointError(f"{folder} holds no whole checkpoint ({faults[0]}); start again with --overwrite")


def fault_of(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint in a few words, None if it is whole."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name in required_files(checkpoint):
        if name not in files:
            return f"{name} is missing from the manifest"
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"] or _sha256(path) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def required_files(checkpoint: Path) -> list[str]:
    """Return the files without which a run cannot go on exactly where it stopped.

    Every process has a random state of its own; sharded weights and optimiser states have files of their own.
    """
    try:
        state = read_run_state(checkpoint)
    except (OSError, ValueError):
        state = {}
    count = state.get("processes", 1)
    random_states = ["rng_state.pth"] if count == 1 else [f"rng_state_{rank}.pth" for rank in range(count)]
    sharded = state.get("sharding") == "fsdp"
    weights = ["pytorch_model_fsdp.bin", "optimizer.bin"] if sharded else ["optimizer.pt"]
    return ["model.safetensors", *weights, "scheduler.pt", *random_states, "trainer_state.json", RUN_STATE]


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """Return the run state stored in a verified checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))
    return state


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and whatever an interrupted writing left behind."""
    for checkpoint in _by_step(folder)[:-keep]:
        shutil.rmtree(checkpoint, ignore_errors=True)
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    numbered = [
        (int(path.name.rsplit("-", 1)[1]), path)
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and path.name.rsplit("-", 1)[1].isdigit()
    ]
    return [path for _, path in sorted(numbered)]


def _open(stage: Path) -> None:
    with explain_write_errors(stage.parent):
        stage.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()


def _close(stage: Path, step: int) -> None:
    with explain_write_errors(stage.parent):
        _seal(stage / f"checkpoint-{step}", step)
        _replace(stage / f"checkpoint-{step}", stage.parent / f"checkpoint-{step}")


def _seal(checkpoint: Path, step: int) -> None:
    """Force every file to disk and write the manifest."""
    files = {}
    for path in sorted(item for item in checkpoint.rglob("*") if item.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    atomic_write_json(checkpoint / MANIFEST, {"step": step, "files": files})


def _replace(source: Path, target: Path) -> None:
    """Put a folder in place of another of the same step (a run resumed from an older one writes it again)."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
