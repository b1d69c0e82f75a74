"""The folder of a run: results.json, table.md and figures; and its page among the documents."""

from pathlib import Path

from mnemon.bench.ops.plots import all_charts
from mnemon.bench.ops.report import markdown
from mnemon.bench.ops.results import OpsRun, write_results
from mnemon.files import atomic_write_bytes, atomic_write_text


def write(folder: Path, run: OpsRun) -> None:
    """Write the results with page and figures."""
    write_results(folder, run)
    write_page(folder / "table.md", run)


def write_page(path: Path, run: OpsRun, prefix: str = "") -> Path:
    """Write the page of a run, and beside it the figures that it shows.

    Args:
        path: the page.
        run: the results.
        prefix: put before the figures' file names.
    """
    figures = []
    for chart in all_charts(run):
        name = f"{prefix}{chart.name}"
        atomic_write_bytes(path.parent / name, chart.png)
        figures.append((chart.title, name))
    return atomic_write_text(path, markdown(run, figures))
