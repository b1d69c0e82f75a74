"""Write docs/results/NAME.md from finished evaluations, and the results block of README.md. No number is typed by hand.

    python scripts/update_results.py babilong-tiny=runs/eval/generated,runs/eval/real --readme babilong-tiny

Several folders of one page stand below each other and, because they have samples of their own, side by side with
unpaired intervals. FOLDER+FOLDER are one evaluation of several training seeds on the same samples, under the same
labels. The README block between the markers gets the first folder of the page named by --readme.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mnemon.errors import ConfigError, DataError, MnemonError
from mnemon.evaluation import tables
from mnemon.evaluation.comparison import Comparison, check_same_samples
from mnemon.evaluation.plots import plot_accuracy_over_length
from mnemon.evaluation.run import EvaluationRun, markdown_page, read_run
from mnemon.evaluation.statistics import unpaired_difference
from mnemon.evaluation.tables import Grid
from mnemon.files import atomic_write_bytes, atomic_write_text, read_text

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Update the pages named on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pages_help = "page and its finished evaluations; FOLDER+FOLDER: training seeds of the same models"
    parser.add_argument("pages", nargs="+", metavar="NAME=FOLDER[,FOLDER...]", help=pages_help)
    parser.add_argument("--readme", metavar="NAME", help="page whose first folder fills the block of the README")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository (default: this one)")
    options = parser.parse_args(arguments)
    try:
        update(options.pages, options.readme, options.root)
    except MnemonError as error:
        print(f"update_results: error: {error}", file=sys.stderr)
        return 2
    return 0


def update(pages: Sequence[str], readme: str | None, root: Path) -> None:
    """Read every run first, then write, so that a bad folder leaves all pages as they were."""
    runs = {}
    for page in pages:
        name, equals, folders = page.partition("=")
        if not (name and equals and folders) or "/" in name:
            raise ConfigError(f"expected NAME=FOLDER[,FOLDER...], got {page!r}")
        runs[name] = [_read_seeds(part.split("+")) for part in folders.split(",")]
    if readme is not None and readme not in runs:
        raise ConfigError(f"--readme {readme}: no such page here; expected one of {', '.join(runs)}")
    results = root / "docs" / "results"
    for name, page_runs in runs.items():
        for number, run in enumerate(page_runs, start=1):
            atomic_write_bytes(results / _figure(name, number), plot_accuracy_over_length(run.comparison).svg)
        print(atomic_write_text(results / f"{name}.md", results_page(name, page_runs)))
    if readme is not None:
        path = root / "README.md"
        print(atomic_write_text(path, fill_block(read_text(path), readme_block(readme, runs[readme][0]), str(path))))


def results_page(name: str, runs: Sequence[EvaluationRun]) -> str:
    """Write one page: a section per run, and several runs side by side at the top."""
    parts = [f"# Results: {name}\n", "Written by `scripts/update_results.py`; do not edit.\n"]
    if len(runs) > 1:
        parts += ["## Side by side\n", _side_by_side(runs)]
    for number, run in enumerate(runs, start=1):
        facts = "".join(f"- {key}: {value}\n" for key, value in run.machine.items())
        parts += [
            f"## {_describe(run)}\n",
            f"![Accuracy over length]({_figure(name, number)})\n",
            markdown_page(run),
            f"Samples: {_samples(run)}. Machine and versions:\n",
            facts,
        ]
    return "\n".join(parts)


def readme_block(name: str, run: EvaluationRun) -> str:
    """Write the short table of the README: model x length, mean over the tasks."""
    comparison = run.comparison
    grid = overview(comparison)
    tasks = ", ".join(comparison.settings.tasks)
    return (
        f"Accuracy in percent, mean over {tasks}, [95 % interval]; {_samples(run)}.\n\n{grid.markdown()}\n"
        f"{tables.caption(comparison)} `{run.command}`; "
        f"tasks, tests and machine: [docs/results/{name}.md](docs/results/{name}.md).\n"
    )


def overview(comparison: Comparison) -> Grid:
    """Arrange mean accuracies as model x length."""
    lines = []
    parameters = {result.label: result.model.num_parameters for result in comparison.results}
    for label in comparison.labels:
        cells = []
        for length in comparison.settings.lengths:
            best = comparison.best(length)
            leads = best is not None and best.label == label
            text = tables.TableCell(
                comparison.accuracy(label, length),
                leads,
                leads and best is not None and best.significant,
                comparison.spread(label, length),
            ).text()
            cells.append(f"**{text}**" if leads else text)
        lines.append((label, f"{parameters[label]:,}", *cells))
    return Grid(("model", "parameters", *comparison.settings.lengths), tuple(lines))


def fill_block(text: str, block: str, name: str) -> str:
    """Replace what stands between the two markers; DataError unless each is there exactly once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"{name}: expected {BEGIN} and then {END}, each once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}{END}{rest.split(END)[1]}"


def _read_seeds(folders: Sequence[str]) -> EvaluationRun:
    """Read evaluations of several training seeds as one."""
    runs = [read_run(Path(folder)) for folder in folders]
    results = tuple(result for run in runs for result in run.results)
    check_same_samples(results)
    return replace(runs[0], results=results, command="; ".join(run.command for run in runs))


def _side_by_side(runs: Sequence[EvaluationRun]) -> str:
    """Compare the first run with every other one, for models and lengths that both have."""
    first, lines = runs[0].comparison, []
    for run in runs[1:]:
        other = run.comparison
        for length in (length for length in first.settings.lengths if length in other.settings.lengths):
            for label in (label for label in first.labels if label in other.labels):
                left, right = first.accuracy(label, length), other.accuracy(label, length)
                change = unpaired_difference(right, left)
                low, mean, high = (f"{100 * value:+.1f}" for value in (change.low, change.mean, change.high))
                texts = (tables.TableCell(left).text(), tables.TableCell(right).text(), f"{mean} [{low}, {high}]")
                lines.append((length, label, *texts))
    note = f"A: {_describe(runs[0])}. B: {'; '.join(_describe(run) for run in runs[1:])}.\n"
    grid = Grid(("length", "model", "A", "B", "B − A (points)"), tuple(lines))
    method = "The samples differ, so the interval of the difference is Newcombe's, made from the two intervals.\n"
    return f"{note}{method}\n{grid.markdown()}"


def _describe(run: EvaluationRun) -> str:
    settings = run.comparison.settings
    return f"stories {settings.stories}, background {settings.background}, seed {settings.seed}"


def _samples(run: EvaluationRun) -> str:
    settings = run.comparison.settings
    counts = {len(cell.predictions) for result in run.results for cell in result.cells}
    range_ = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"{range_} samples per task and length ({_describe(run)}, {settings.layout} prompt)"


def _figure(name: str, number: int) -> str:
    return f"{name}-{number}.svg"


if __name__ == "__main__":
    sys.exit(main())
