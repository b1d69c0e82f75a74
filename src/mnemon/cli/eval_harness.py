"""`mnemon eval --suite mmlu`, `recall`, `commonsense` and `longbench`: suites of lm-evaluation-harness."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnemon.cli.display import command_line, portable, task_bar
from mnemon.files import prepare_output_folder

if TYPE_CHECKING:
    from mnemon.evaluation.controls import ModelSpec
    from mnemon.evaluation.harness.data import DataSource
    from mnemon.evaluation.harness.records import HarnessRun
    from mnemon.evaluation.harness.tasks import TaskOptions

HARNESS_SUITES = ("mmlu", "recall", "commonsense", "longbench")


def data_source(data: list[Path] | None) -> "DataSource":
    """Return where the rows of the suites come from: the hub, a folder, or the made samples."""
    from mnemon.evaluation.harness.data import DataSource, check_folder_option

    folder = check_folder_option(data)
    return DataSource.parse(folder, None if folder is None else portable(folder))


def task_options(
    limit: int | None, num_fewshot: int | None, context_length: int | None, answer_length: int | None
) -> "TaskOptions":
    """Return how tasks are measured, once it is known that the harness is installed."""
    from mnemon.evaluation.harness.access import require_harness

    require_harness()
    from mnemon.evaluation.harness.tasks import TaskOptions

    return TaskOptions(limit, num_fewshot, context_length, answer_length)


def check_suite(suite: str, tasks: list[str] | None, options: "TaskOptions") -> None:
    """Refuse unknown tasks and wrong options before any model is loaded."""
    from mnemon.evaluation.harness.catalogue import SUITES
    from mnemon.evaluation.harness.tasks import check_options

    SUITES[suite].entries(tasks)
    check_options(SUITES[suite], options)


def available_tasks(source: "DataSource", suite: str) -> list[str] | None:
    """Return the tasks there is data for in a folder; None for all of them, or where only trying will tell.

    Raises:
        MissingData: there is none.
    """
    from mnemon.evaluation.harness.catalogue import SUITES
    from mnemon.evaluation.harness.data import MissingData

    found = source.available(SUITES[suite])
    if not found:
        raise MissingData(f"{source.name}: no file of the suite {suite} (see docs/suites.md)")
    return None if len(found) == len(SUITES[suite].tasks) else found


def evaluate_harness(
    suite: str,
    specs: "Sequence[ModelSpec]",
    source: "DataSource",
    options: "TaskOptions",
    *,
    tasks: list[str] | None,
    batch_size: int | None,
    max_batch_tokens: int | None,
    folder: Path,
    overwrite: bool,
    resume: bool,
    show_progress: bool,
) -> "HarnessRun":
    """Measure a suite and write its folder; an interruption leaves the finished cells for `--resume`.

    Args:
        suite: name of the suite.
        specs: models with their tokenizers.
        source: of the data.
        options: how the tasks are measured.
        tasks: names of tasks; None for all.
        batch_size: most rows per call; None = by tokens alone.
        max_batch_tokens: most padded tokens per call; None = chosen for every model.
        folder: output folder.
        overwrite: empty it first.
        resume: take over the cells that are finished there.
        show_progress: on standard error.
    """
    from mnemon.evaluation.harness.catalogue import SUITES
    from mnemon.evaluation.harness.records import CELLS
    from mnemon.evaluation.harness.runner import evaluate_suite
    from mnemon.evaluation.harness.tables import write_suite

    prepare_output_folder(folder, overwrite, resume)
    total = len(specs) * len(SUITES[suite].tasks if tasks is None else tasks)
    try:
        with task_bar(show_progress, total) as progress:
            run = evaluate_suite(
                suite,
                specs,
                source,
                options,
                tasks=tasks,
                batch_size=batch_size,
                max_batch_tokens=max_batch_tokens,
                cells_folder=folder / CELLS,
                command=command_line(sys.argv),
                progress=progress,
            )
    except KeyboardInterrupt:
        print(f"{folder}: finished tasks are kept; go on with --resume", file=sys.stderr)
        raise
    write_suite(folder, run)
    return run


def print_harness(run: "HarnessRun", folder: Path, profile: bool) -> None:
    """Print the table of a suite, and where the time went if that is asked for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mnemon.evaluation.harness.catalogue import SUITES
    from mnemon.evaluation.harness.records import TABLE
    from mnemon.evaluation.harness.tables import notes, suite_grid

    grid = suite_grid(run)
    table = Table(title=SUITES[run.suite].title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for number, name in enumerate(grid.head):
        table.add_column(name.replace("[", "\\["), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for line in grid.lines:
        table.add_row(*(text.replace("[", "\\[") for text in line))
    console = Console()
    console.print(table)
    for note in notes(run):
        console.print(note, style="dim", markup=False)
    if profile:
        print(profile_line(run))
    print(f"Table: {folder / TABLE}")


def profile_line(run: "HarnessRun") -> str:
    """Say how much of the time the models themselves took."""
    firsts = [row for row in run.rows if row.counts_first]
    return share_in_model(sum(row.forward_seconds for row in firsts), sum(row.seconds for row in firsts))


def share_in_model(forward_seconds: float, seconds: float) -> str:
    """Write the share of some seconds that was spent in the forward of the models."""
    share = 100 * forward_seconds / max(seconds, 1e-9)
    return f"In the models' forward: {forward_seconds:.2f} of {seconds:.2f} s ({share:.0f} %)"
