"""What several commands show alike: quiet libraries, the progress of an evaluation, its table, the command line itself.

Results go to standard output, progress to standard error.
"""

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mnemon.evaluation.comparison import Comparison
    from mnemon.evaluation.diagnostics import MemoryReport
    from mnemon.evaluation.suite import SuiteProgress
    from mnemon.evaluation.tables import Grid

_BOLD = re.compile(r"\*\*.+\*\*")

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


def print_grid(grid: "Grid", title: str, note: str = "") -> None:
    """Print a table of texts; two stars around a text mean bold.

    A table that is wider than the terminal is printed in parts, each with the names; a file has room for every column.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 2 + sum(_widths(grid)))
    for number, columns in enumerate(_parts(grid, console.width)):
        heading = title if number == 0 else f"{title}, continued"
        table = Table(title=heading, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
        for column in columns:
            is_name = column < grid.num_names
            justify: Literal["left", "right"] = "left" if is_name else "right"
            table.add_column(_escape(grid.head[column]), justify=justify, no_wrap=not is_name, overflow="fold")
        for starts_group, line in grid.grouped():
            if starts_group:
                table.add_section()
            table.add_row(*(_styled(line[column]) for column in columns))
        console.print(table)
    if note:
        console.print(note, style="dim", markup=False)


def _widths(grid: "Grid") -> list[int]:
    """Give the width of every column with the space between columns."""
    rows = [grid.head, *grid.lines]
    return [3 + max(len(row[column].replace("**", "")) for row in rows) for column in range(len(grid.head))]


def _parts(grid: "Grid", width: int) -> list[list[int]]:
    """Share the columns of numbers among as many tables as the width needs; names stand in each."""
    widths, names = _widths(grid), list(range(grid.num_names))
    room = max(width - sum(widths[column] for column in names), width // 2) - 2
    parts, used = [list(names)], 0
    for column in range(grid.num_names, len(widths)):
        if used and used + widths[column] > room:
            parts.append(list(names))
            used = 0
        parts[-1].append(column)
        used += widths[column]
    return parts


def _styled(text: str) -> str:
    return f"[bold]{_escape(text[2:-2])}[/]" if _BOLD.fullmatch(text) else _escape(text)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


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
