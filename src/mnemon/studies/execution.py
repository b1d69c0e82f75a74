"""Run what a study has planned, in this process or in several, and never twice.

A run is finished when its `summary.json` says so and its `measures.json` is there; an interrupted one goes on from its
newest checkpoint. Ctrl-C lets every running one save a checkpoint and stop.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import transformers

from mnemon.errors import ConfigError, DataError, MnemonError, RunError
from mnemon.evaluation.machine import describe_machine
from mnemon.files import atomic_write_text, read_text
from mnemon.studies.study import Json, PlannedRun, Study
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import load_recipe
from mnemon.training.run import RECIPE_FILE, SUMMARY_FILE, train
from mnemon.training.trainer import wants_cuda

MEASURES = "measures.json"
MACHINE = "machine"
_INTERRUPTED = 130
_PATIENCE = 120.0
_MAY_DIFFER = ("output", "optimisation.threads", "data.workers")

Report = Callable[[str], None]


def execute(study: Study, runs: Sequence[PlannedRun], root: Path, jobs: int, report: Report) -> None:
    """Train and measure the runs that are not finished.

    Args:
        study: what is measured.
        runs: from `mnemon.studies.planning.plan_runs`.
        root: folder of the study.
        jobs: runs at the same time, each in a process of its own; 1 = all in this process.
        report: told when a run ends.

    Raises:
        ConfigError: a folder holds a run of another recipe.
        RunError: a run in a process of its own failed; the others are stopped and can go on later.
        KeyboardInterrupt: after Ctrl-C, when all runs have saved their state.
    """
    left = [run for run in runs if not is_finished(run, root)]
    if len(left) < len(runs):
        report(f"{len(runs) - len(left)} of {len(runs)} runs are finished already")
    if jobs > 1 and len(left) > 1:
        _execute_in_processes(study, left, root, jobs, report)
        return
    for number, run in enumerate(left, start=1):
        started = time.monotonic()
        complete(study, run, root)
        report(f"{number} of {len(left)}: {run.name}, {time.monotonic() - started:.0f} s")


def complete(study: Study, run: PlannedRun, root: Path) -> None:
    """Train a run, or go on with it, and measure it.

    Raises:
        KeyboardInterrupt: it was interrupted and has saved a checkpoint.
    """
    folder = run.folder(root)
    if not is_trained(folder):
        resumable = any((folder / "checkpoints").glob("checkpoint-*"))
        overwrite = folder.is_dir() and not resumable
        summary = train(run.recipe, folder, overwrite=overwrite, resume=resumable, show_progress=False)
        if summary["stop_reason"] == "interrupted":
            raise KeyboardInterrupt
    measures = {**_asked(run), MACHINE: machine_of(run.recipe), **study.measure(run, folder)}
    atomic_write_text(folder / MEASURES, json.dumps(measures, allow_nan=False) + "\n")


def machine_of(recipe: Recipe) -> dict[str, str]:
    """Describe this machine as a run of a recipe uses it."""
    facts = describe_machine("cuda" if wants_cuda(recipe.optimisation) else "cpu")
    threads = recipe.optimisation.threads
    return facts if threads is None else {**facts, "threads": f"{threads} per run"}


def refuse_untrained(runs: Sequence[PlannedRun], root: Path) -> None:
    """Refuse to go on with runs that this process will not train.

    Raises:
        ConfigError: one is not trained, or of another recipe.
    """
    left = [run for run in runs if not is_finished(run, root) and not is_trained(run.folder(root))]
    if left:
        raise ConfigError(
            f"{len(left)} of {len(runs)} runs of this scale have to be launched first, such as {left[0].name}; "
            "--dry-run prints the lines"
        )


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Keep other processes from working on a study at the same time, as far as the file system has locks.

    Raises:
        ConfigError: another one does.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    path = root.parent / f".{root.name}.lock"
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{root}: another process works on this study; wait for it, or use --jobs") from None
        yield


def is_finished(run: PlannedRun, root: Path) -> bool:
    """Say whether a run is trained and measured.

    Raises:
        ConfigError: the folder holds a run of another recipe.
    """
    folder = run.folder(root)
    if (folder / RECIPE_FILE).is_file():
        earlier = load_recipe(folder / RECIPE_FILE)
        refuse_other(folder, earlier.model_dump(mode="json"), run.recipe.model_dump(mode="json"))
    return is_trained(folder) and _is_measured(folder, run)


def read_json(path: Path) -> Json:
    """Read a JSON object of a run.

    Raises:
        DataError: the file is missing or not a JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); delete it and run again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}; delete it and run again")
    return value


def _is_measured(folder: Path, run: PlannedRun) -> bool:
    if not (folder / MEASURES).is_file():
        return False
    measures = read_json(folder / MEASURES)
    return all(measures.get(key) == value for key, value in _asked(run).items())


def _asked(run: PlannedRun) -> Json:
    """Return what a measurement depends on besides the trained model."""
    return {"samples": run.samples} | ({"lengths": list(run.lengths)} if run.lengths else {})


def is_trained(folder: Path) -> bool:
    """Say whether the run in a folder came to its end, its own validation included."""
    if not (folder / SUMMARY_FILE).is_file():
        return False
    summary = read_json(folder / SUMMARY_FILE)
    return summary.get("stop_reason") != "interrupted" and bool(summary.get("validation"))


def refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder with another recipe than it was begun with; where it is written may differ.

    Args:
        folder: to name in the message.
        before: what the folder was begun with, as nested dictionaries.
        now: what is wanted.

    Raises:
        ConfigError: they differ; the first key is named.
    """
    for key, old, new in differences(before, now):
        if not key.removeprefix("recipe.").startswith(_MAY_DIFFER):
            raise ConfigError(
                f"{folder}: was begun with {key} {old!r}, now it is {new!r}; use --overwrite or another --output"
            )


def differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Go through the dotted keys in which two nested dictionaries differ, with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif before != now:
        yield prefix, before, now


def _execute_in_processes(study: Study, runs: Sequence[PlannedRun], root: Path, jobs: int, report: Report) -> None:
    context = multiprocessing.get_context("spawn")
    waiting, done = list(runs), 0
    active: dict[int, tuple[Any, Connection, PlannedRun]] = {}
    with _termination_interrupts():
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    run = waiting.pop(0)
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_complete_alone, args=(study, run, root, sender))
                    with _interrupts_ignored():
                        process.start()
                    sender.close()
                    active[process.sentinel] = (process, receiver, run)
                ended = wait(list(active))
                for sentinel in [sentinel for sentinel in active if sentinel in ended]:
                    process, receiver, run = active.pop(sentinel)
                    process.join()
                    _check_end(process.exitcode, receiver, run)
                    done += 1
                    report(f"{done} of {len(runs)}: {run.name}")
        finally:
            _stop([process for process, _, _ in active.values()])


def _check_end(code: int | None, receiver: Connection, run: PlannedRun) -> None:
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        try:
            reason = receiver.recv()
        except EOFError:
            reason = f"its process ended with code {code}"
        raise RunError(f"{run.name}: {reason}")


def _stop(processes: Sequence[Any]) -> None:
    """Ask processes to save their state and end, and end those that do not in time."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _complete_alone(study: Study, run: PlannedRun, root: Path, sender: Connection) -> None:
    """Complete a run in this process, which has been started for it; what goes wrong is told to the parent."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.setsid()  # the parent passes Ctrl-C on: a second one from the terminal would not wait for the checkpoint
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        complete(study, run, root)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except MnemonError as error:
        sender.send(str(error))
        sys.exit(2)


def _stop_with_parent() -> None:
    """Stop this process like `_stop` when the parent dies, so that nobody else finds its run still going."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Handle a signal in another way for a while; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, earlier)


def _termination_interrupts() -> AbstractContextManager[None]:
    """Treat a request to terminate like Ctrl-C, so that no child is left behind."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    return _handled(signal.SIGTERM, interrupt)


def _interrupts_ignored() -> AbstractContextManager[None]:
    """Start a child that a Ctrl-C in the terminal does not reach: the parent asks it to stop, once."""
    return _handled(signal.SIGINT, signal.SIG_IGN)
