"""What a run tells while it goes: progress bar, `training_log.jsonl`, TensorBoard; and when it stops.

One callback of Hugging Face's Trainer drives all of it, because all of it happens at the end of a step. Nothing here
changes what is learned. With several processes each has its callback, so that all save and stop at the same step; only
the first one's writes and shows anything.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mnemon.files import atomic_write_text, explain_disk_errors
from mnemon.training.distributed import Processes
from mnemon.training.trainer import AnswerTrainer, Window

_PLAIN_LINE_SECONDS = 30.0


class TrainingLog:
    """`training_log.jsonl`: one JSON object per line, appended; a resumed run cuts it back to its checkpoint first."""

    def __init__(self, path: Path, from_step: int) -> None:
        self.path = path
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= from_step]
        atomic_write_text(path, "".join(f"{line}\n" for line in kept))

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry at the end of the file."""
        with explain_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Telemetry(TrainerCallback):
    """Log, save and stop at the right steps, and show progress on stderr.

    Args:
        trainer: the running trainer, whose window, progress and curriculum are read.
        log: where entries go, None for nowhere.
        tensorboard: folder of the scalars, None for none.
        show: draw a progress bar (on a terminal) or print a line now and then (elsewhere).
    """

    def __init__(self, trainer: AnswerTrainer, log: TrainingLog | None, tensorboard: Path | None, show: bool) -> None:
        self.trainer, self.log, self.show = trainer, log, show
        self._writer = _summary_writer(tensorboard)
        self._display = _Display(trainer, show)
        self._logged_at = 0.0
        self._has_reported = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the display."""
        self.trainer.progress.start_clock()
        self._logged_at = time.monotonic()
        self._display.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log, save and stop as the recipe, the budget or the user says."""
        output = self.trainer.recipe.output
        reason = self._stop_reason()
        if reason:
            self.trainer.progress.stop_reason = reason
            control.should_training_stop = True
        control.should_save = bool(reason) or state.global_step % output.save_every_steps == 0
        if control.should_save or state.global_step % output.log_every_steps == 0:
            self._report(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the display and the writer away."""
        self.close()

    def close(self) -> None:
        """Stop drawing and writing; safe to call twice."""
        self._display.stop()
        if self._writer is not None:
            self._writer.close()

    def _stop_reason(self) -> str:
        progress = self.trainer.progress
        if progress.stop_agreed or (progress.stop_requested and self.trainer.processes.count == 1):
            return "interrupted"
        options = self.trainer.recipe.data.curriculum
        if options.stop_when_learned and self.trainer.curriculum.learned_all:
            return "learned"
        return self.trainer.progress.exhausted()

    def _report(self, step: int) -> None:
        now = time.monotonic()
        entry = log_entry(self.trainer, step, self.trainer.window, now - self._logged_at)
        if not self._has_reported:
            entry |= {"engine": self.trainer.engine, "processes": self.trainer.processes.count}
            self._has_reported = True
        self._logged_at, self.trainer.window = now, Window()
        if self.log is not None:
            self.log.append(entry)
        if self._writer is not None:
            for name, value in _scalars(entry):
                self._writer.add_scalar(name, value, step)
        self._display.update(entry)


def log_entry(trainer: AnswerTrainer, step: int, window: Window, seconds: float) -> dict[str, Any]:
    """Return one line of the training log.

    Args:
        trainer: the running trainer.
        step: optimisation steps done.
        window: sums since the previous line.
        seconds: wall-clock time since the previous line.

    Returns:
        Loss and answer accuracy (share of questions fully right, None where nothing is asked) since the previous line,
        in all and by task and length; learning rate, gradient norm, tokens seen, tokens per second, stage and its
        running accuracy; `memory/<name>`: mean of each scalar that the model returned as a diagnostic (None if it is
        not finite).
    """
    right = sum(counts[0] for counts in window.answers.values())
    asked = sum(counts[1] for counts in window.answers.values())
    running = trainer.curriculum.accuracy
    return {
        "step": step,
        "tokens": trainer.progress.tokens,
        "minutes": round(trainer.progress.elapsed() / 60, 3),
        "loss": window.loss / max(1, window.batches),
        "accuracy": right / asked if asked else None,
        "answers": {f"{task}@{n}": [c[0], c[1]] for (task, n), c in sorted(window.answers.items())},
        "stage": trainer.curriculum.stage,
        "length": trainer.curriculum.length,
        "stage_accuracy": {task: round(value, 4) for task, value in running.items()},
        "learning_rate": trainer._get_learning_rate(),
        "grad_norm": trainer.last_grad_norm,
        "tokens_per_second": round(window.tokens / max(seconds, 1e-9), 1),
    } | mean_diagnostics(window, trainer.processes)


def mean_diagnostics(window: Window, processes: Processes) -> dict[str, float | None]:
    """Return the mean of every diagnostic over the batches that gave it and all processes, as `memory/<name>`.

    A process whose rows complete no segment may lack a name; the mean is over those that have it.
    """
    own = {name: [float(value) for value in values] for name, values in window.diagnostics.items()}
    shares = processes.gather(own)
    means: dict[str, float | None] = {}
    for name in sorted({name for share in shares for name in share}):
        values = [value for share in shares for value in share.get(name, [])]
        mean = sum(values) / len(values)
        means[f"memory/{name}"] = mean if math.isfinite(mean) else None
    return means


class _Display:
    """A rich progress bar on a terminal; elsewhere one plain line every half minute."""

    def __init__(self, trainer: AnswerTrainer, show: bool) -> None:
        self.trainer, self.show = trainer, show
        self._bar: Progress | None = None
        self._printed_at = time.monotonic()

    def start(self) -> None:
        console = Console(stderr=True)
        if not self.show or not console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            console=console,
        )  # fmt: skip
        self._bar.add_task(self.trainer.recipe.name, total=1.0, text="")
        self._bar.update(self._bar.task_ids[0], completed=self._fraction())
        self._bar.start()

    def update(self, entry: dict[str, Any]) -> None:
        right = "" if entry["accuracy"] is None else f"right {entry['accuracy']:.0%}  "
        text = (
            f"step {entry['step']}  loss {entry['loss']:.3f}  {right}"
            f"length {entry['length']}  {entry['tokens_per_second'] / 1000:.1f}k tok/s"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._fraction(), text=text)
        elif self.show and time.monotonic() - self._printed_at >= _PLAIN_LINE_SECONDS:
            self._printed_at = time.monotonic()
            running = "  ".join(f"{task} {value:.0%}" for task, value in entry["stage_accuracy"].items())
            print(
                f"{entry['minutes']:.1f} min  {self._fraction():.0%}  {text}  |  {running}", file=sys.stderr, flush=True
            )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _fraction(self) -> float:
        """Return the share of the nearer budget that is used."""
        progress = self.trainer.progress
        budget = progress.budget
        shares = [0.0]
        if budget.max_tokens is not None:
            shares.append(progress.tokens / budget.max_tokens)
        if budget.max_minutes is not None:
            shares.append(progress.elapsed() / (60 * budget.max_minutes))
        return min(1.0, max(shares))


def _whole_lines(path: Path) -> list[str]:
    """Return the complete JSON lines of a log; a line cut short by a crash is dropped."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict) or "step" not in entry:
            break
        lines.append(line)
    return lines


def _scalars(entry: dict[str, Any]) -> list[tuple[str, float]]:
    names = ("loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_second", "stage", "length")
    scalars = [(f"train/{name}", float(entry[name])) for name in names if entry[name] is not None]
    scalars += [(name, value) for name, value in entry.items() if name.startswith("memory/") and value is not None]
    return scalars + [(f"accuracy/{key}", counts[0] / counts[1]) for key, counts in entry["answers"].items()]


def _summary_writer(folder: Path | None) -> Any:
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(folder))
