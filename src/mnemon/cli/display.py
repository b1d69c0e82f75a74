"""What several commands show alike: quiet libraries, the progress of an evaluation, its table, the command line itself.

Results go to standard output, progress to standard error.
"""

import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mnemon.evaluation.comparison import Comparison
    from mnemon.evaluation.diagnostics import MemoryReport
    from mnemon.evaluation.suite import SuiteProgress

REAL_DATA = "MNEMON_REAL_DATA"
"""Environment variable with the folder of the real data; where it is set, commands are recorded with the variable."""


def silence_libraries(*, keep_bars: bool = False) -> None:
    """Keep Hugging Face's loading bars and advice about kernels out of what a command has to say.

    Args:
        keep_bars: leave the bars, for a command that may download.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not keep_bars:
        logging.disable_progress_bar()


@contextmanager
def question_bar(show: bool, total: int) -> "Iterator[SuiteProgress | None]":
    """Show on standard error which model, task and length is at work, and how many questions are done."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} questions"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("making samples", total=total)

        def report(label: str, task: str, length: str, count: int) -> None:
            bar.update(line, description=f"{label}  {task} at {length}", advance=count)

        yield report


@contextmanager
def task_bar(show: bool, total: int) -> Iterator[Callable[[str, str], None]]:
    """Show on standard error which model and task is done, and how many there are."""
    if not show:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} tasks"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("reading data", total=total)

        def report(label: str, task: str) -> None:
            bar.update(line, description=f"{label}  {task}", advance=1)

        yield report


@contextmanager
def token_bar(show: bool, total: int) -> Iterator[Callable[[int], None]]:
    """Show on standard error how many tokens of a text are read, at what speed, and how long it will take."""
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("reading", total=total, speed="")
        started = time.monotonic()

        def report(read: int) -> None:
            speed = read / max(time.monotonic() - started, 1e-9)
            bar.update(line, completed=read, speed=f"{speed:,.0f} tokens/s")

        yield report


def print_comparison(comparison: "Comparison") -> None:
    """Print the accuracy table and what a reader must know about its models."""
    from rich.console import Console

    from mnemon.evaluation.tables import rich_table

    console = Console()
    console.print(rich_table(comparison))
    for note in comparison.notes():
        console.print(note, style="dim", markup=False)


def print_memory(reports: "Sequence[MemoryReport]") -> None:
    """Print what the memories did, one column per model and length (the numbers have long names)."""
    from rich.console import Console
    from rich.table import Table

    from mnemon.evaluation.diagnostics import MEANINGS

    table = Table(title="What the memory does", title_justify="left")
    table.add_column("mean of")
    for report in reports:
        table.add_column(f"{report.label} {report.length}", justify="right")
    for name, meaning in MEANINGS.items():
        table.add_row(meaning, *(f"{report.means.get(name, float('nan')):.3g}" for report in reports))
    Console().print(table)


def command_line(argv: list[str]) -> str:
    """Write the command so that it can be given again elsewhere: program by name, real data by variable.

    What only concerns the folder of this run is left out.
    """
    words = [word for word in argv[1:] if word not in ("--resume", "--overwrite")]
    return " ".join(["mnemon", *(_quote(portable(word)) for word in words)])


def portable(path: str) -> str:
    """Replace the folder of the real data, if it is named by the environment, by the variable's name."""
    folder = os.environ.get(REAL_DATA, "").rstrip("/")
    return path.replace(folder, f"${REAL_DATA}", 1) if folder and path.startswith(folder) else path


def _quote(word: str) -> str:
    return f'"{word}"' if word.startswith(f"${REAL_DATA}") else shlex.quote(word)
