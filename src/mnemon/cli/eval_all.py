"""What `mnemon eval` prints at its end, for one suite or for all that there is data for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemon.cli.display import print_comparison, print_grid, print_memory
from mnemon.cli.eval_harness import HARNESS_SUITES
from mnemon.errors import BackendUnavailable, ConfigError, DataError
from mnemon.files import atomic_write_json, atomic_write_text

if TYPE_CHECKING:
    from mnemon.evaluation.harness.records import HarnessRun
    from mnemon.evaluation.measures import MeasuredRun
    from mnemon.evaluation.run import EvaluationRun

FORMAT = "mnemon-suites-1"
RESULTS, TABLE = "results.json", "table.md"


@dataclass(frozen=True)
class Finished:
    """A suite that has been measured and written.

    Attributes:
        value: content of its `results.json`.
        page: content of its `table.md`.
        show: prints it for people.
    """

    value: Mapping[str, Any]
    page: str
    show: Callable[[], None]

    def print(self, folder: Path, as_json: bool) -> None:
        """Print it, as one JSON object or for people."""
        if as_json:
            print(json.dumps({"output": str(folder), **self.value}, ensure_ascii=False, allow_nan=False))
        else:
            self.show()


def finished_babilong(run: "EvaluationRun", folder: Path, profile: str = "") -> Finished:
    """Describe an evaluation on BABILong."""
    from mnemon.evaluation.run import markdown_page, summary
    from mnemon.evaluation.tables import RETRIEVAL_NOTE, has_retrieval, retrieval_grid

    comparison = run.comparison

    def show() -> None:
        print_comparison(comparison)
        if has_retrieval(comparison):
            print_grid(retrieval_grid(comparison), "Retrieval", RETRIEVAL_NOTE)
        if run.diagnostics:
            print_memory(run.diagnostics)
        if profile:
            print(profile)
        print(f"Report: {folder / 'report.html'}")

    return Finished(summary(run, comparison), markdown_page(run), show)


def finished_measures(run: "MeasuredRun", folder: Path) -> Finished:
    """Describe a suite without generation."""
    from mnemon.cli.eval_suites import print_measures
    from mnemon.evaluation.measures import measures_page

    return Finished(run.value(), measures_page(run), lambda: print_measures(run, folder))


def finished_harness(run: "HarnessRun", folder: Path, profile: bool) -> Finished:
    """Describe a suite of the harness."""
    from mnemon.cli.eval_harness import print_harness
    from mnemon.evaluation.harness.tables import suite_page

    return Finished(run.value(), suite_page(run), lambda: print_harness(run, folder, profile))


def evaluate_all(
    folder: Path, suites: Mapping[str, Callable[[Path], Finished]], command: str, show_titles: bool
) -> Finished:
    """Run one suite after the other, each into a folder of its own, and write what they say together.

    A suite without data, or that does not suit the models, is left out and the reason kept; damaged files of data end
    the run.

    Args:
        folder: output folder, already prepared.
        suites: by name what measures it into a folder.
        command: command line for the record.
        show_titles: say on standard output which suite comes next.

    Raises:
        ConfigError: no suite could be run.
        DataError: data are malformed.
    """
    from mnemon.evaluation.harness.data import MissingData

    done: dict[str, Finished] = {}
    left_out: dict[str, str] = {}
    for name, measure in suites.items():
        if show_titles:
            print(f"{name} ...", flush=True)
        try:
            done[name] = measure(folder / name)
        except (ConfigError, BackendUnavailable, DataError) as error:
            if isinstance(error, DataError) and not isinstance(error, MissingData) and name in HARNESS_SUITES:
                raise
            left_out[name] = " ".join(str(error).split())
    if not done:
        raise ConfigError(f"no suite could be run; {next(iter(left_out))}: {next(iter(left_out.values()))}")
    pages = [f"## {name}\n\n{finished.page}" for name, finished in done.items()]
    pages += [f"## {name}\n\nLeft out: {reason}\n" for name, reason in left_out.items()]
    atomic_write_text(folder / TABLE, "\n".join(pages))
    value = {
        "format": FORMAT,
        "command": command,
        "suites": {name: {"folder": name, **finished.value} for name, finished in done.items()},
        "left_out": left_out,
    }
    atomic_write_json(folder / RESULTS, value)

    def show() -> None:
        for finished in done.values():
            finished.show()
        for name, reason in left_out.items():
            print(f"Left out: {name} ({reason})")
        print(f"All tables: {folder / TABLE}")

    return Finished(value, "\n".join(pages), show)
