"""`mnemon compare`: finished runs side by side, with paired tests, in the form of a paper's table."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemon.cli.display import command_line, portable, print_grid
from mnemon.cli.options import JsonOption, OverwriteOption
from mnemon.errors import ConfigError
from mnemon.files import atomic_write_bytes, atomic_write_json, atomic_write_text, prepare_output_folder

if TYPE_CHECKING:
    from mnemon.evaluation.compare.build import CompareOptions
    from mnemon.evaluation.compare.document import Document

_FORMS = ("terminal", "markdown", "html", "latex")
_CORRECTIONS = ("holm", "bh")
_RULES = ("exact", "official")


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[LABEL=]RUN...",
            help="Folders of finished evaluations and training runs, or files of samples (.jsonl).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for tables, figures and page. (default: print only)"),
    ] = None,
    form: Annotated[
        str, typer.Option("--form", help=f"How to print: {', '.join(_FORMS[:-1])} or {_FORMS[-1]}.")
    ] = "terminal",
    correction: Annotated[
        str, typer.Option(help="For the number of tests: holm (any false difference) or bh (their share).")
    ] = "holm",
    baseline: Annotated[
        str | None, typer.Option(help="Test every model against this one only. (default: every pair)")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Put the BABILong numbers of LM2, RMT, ARMT and others beside.")
    ] = False,
    rule: Annotated[
        str | None, typer.Option(help="Marks of BABILong answers: exact or official. (default: the runs' own)")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Compare these tasks only, separated by commas.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Compare these lengths only, separated by commas.")] = None,
    separate_seeds: Annotated[
        bool, typer.Option("--separate-seeds", help="Keep the training seeds of one recipe apart.")
    ] = False,
    json_output: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare finished runs: `mnemon compare runs/eval/lm2 runs/eval/rmt --baseline LM2 -o runs/compare`.

    Runs of BABILong, of other suites and of training may be mixed; each kind gets a section. Runs of one recipe and
    different training seeds are one model, with its spread over seeds.
    """
    if form not in _FORMS:
        raise ConfigError(f"unknown form {form!r}; expected one of {', '.join(_FORMS)}")
    with_figures = output is not None or (form == "html" and not json_output)
    options = _options(correction, baseline, rule, published, tasks, lengths, separate_seeds, with_figures)
    from mnemon.evaluation.compare.build import compare as compare_runs
    from mnemon.evaluation.compare.runs import read_sources

    sources = read_sources(runs)
    document = compare_runs(sources, options, portable(command_line(sys.argv)))
    if output is not None:
        _write(document, output, overwrite)
    if json_output:
        place = {} if output is None else {"output": str(output)}
        print(json.dumps({**place, **document.value()}, ensure_ascii=False))
    elif form != "terminal":
        print(_formed(document, form), end="")
    else:
        _print(document)
        if output is not None:
            print(f"Report: {output / 'report.html'}")


def _options(
    correction: str,
    baseline: str | None,
    rule: str | None,
    published: bool,
    tasks: str | None,
    lengths: str | None,
    separate_seeds: bool,
    with_figures: bool,
) -> "CompareOptions":
    from mnemon.evaluation.compare.build import CompareOptions

    known_correction = next((known for known in _CORRECTIONS if known == correction), None)
    if known_correction is None:
        raise ConfigError(f"unknown correction {correction!r}; expected one of {', '.join(_CORRECTIONS)}")
    if rule is not None and rule not in _RULES:
        raise ConfigError(f"unknown rule {rule!r}; expected one of {', '.join(_RULES)}")
    return CompareOptions(
        correction="bh" if correction == "bh" else "holm",
        baseline=baseline,
        rule=None if rule is None else "official" if rule == "official" else "exact",
        published=published,
        tasks=_words(tasks, "--tasks"),
        lengths=_words(lengths, "--lengths"),
        separate_seeds=separate_seeds,
        with_figures=with_figures,
    )


def _words(text: str | None, option: str) -> tuple[str, ...] | None:
    if text is None:
        return None
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise ConfigError(f"{option} takes names separated by commas, got {text!r}")
    return words


def _formed(document: "Document", form: str) -> str:
    if form == "latex":
        from mnemon.evaluation.compare.latex import latex

        return latex(document)
    if form == "html":
        from mnemon.evaluation.compare.page import page

        return page(document)
    from mnemon.evaluation.compare.document import markdown

    return markdown(document)


def _write(document: "Document", folder: Path, overwrite: bool) -> None:
    """Write every form and every figure; `comparison.json` last, so that its presence means all."""
    from mnemon.evaluation.compare.document import markdown
    from mnemon.evaluation.compare.latex import latex
    from mnemon.evaluation.compare.page import page

    prepare_output_folder(folder, overwrite, resumable=False)
    for plot in document.plots:
        atomic_write_bytes(folder / f"{plot.name}.png", plot.png)
        atomic_write_bytes(folder / f"{plot.name}.svg", plot.svg)
    atomic_write_text(folder / "table.md", markdown(document, figures=True))
    atomic_write_text(folder / "table.tex", latex(document))
    atomic_write_text(folder / "report.html", page(document))
    atomic_write_json(folder / "comparison.json", document.value())


def _print(document: "Document") -> None:
    from rich.console import Console

    console = Console()
    for section in document.sections:
        for table in section.tables:
            print_grid(table.narrow or table.grid, table.title, table.note)
        for sentence in (*section.lead, *section.notes):
            console.print(sentence, style="dim" if sentence in section.notes else "", markup=False, highlight=False)
