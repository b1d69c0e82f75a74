"""`mnemon reproduce`: run a study, or what is left of it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli.display import command_line, silence_libraries
from mnemon.cli.options import JsonOption, OverwriteOption
from mnemon.errors import ConfigError

if TYPE_CHECKING:
    from mnemon.studies.order import Order


def reproduce(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help="lm2-table1, lm2-more-tasks, lm2-ablation, lm2-figure5, lm2-mmlu, mom-mqar, mom-text; "
            "or mom-tables, the last two.",
        ),
    ],
    scale: Annotated[str, typer.Option(help="tiny, small, or paper where it has one (--dry-run first).")] = "tiny",
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds per variant. (default: the scale's)")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Variants to run, such as 'gla.*'; repeatable.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of all runs' recipes; repeatable."),
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Text to train and measure on: stdlib, a folder of .txt files, or hf:NAME.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples per measured cell. (default: the scale's)")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="0k,4k,...", help="Measured lengths where the data is BABILong.")
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(metavar="RATE,RATE,...", help="Choose every variant's learning rate from these, on seed 0."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each in a process of its own.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the study. (default: runs/studies/STUDY)")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every run, its size and an estimate of the time; train nothing.")
    ] = False,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Run a study: `mnemon reproduce mom-mqar --scale tiny`.

    What is finished in the output folder is kept and what was interrupted goes on, so that the same command given again
    completes a study. The folder gets results.json, page.md and figures.
    """
    from mnemon.studies.order import Order
    from mnemon.studies.registry import get_study, parts_of

    parts = parts_of(study, scale)
    root = output or Path("runs/studies") / study
    orders = {}
    for part in parts:
        text = _text_change(get_study(part).recipe, part, background, ignored=part != study)
        orders[root if part == study else root / part] = Order(
            part,
            scale,
            seeds=seeds,
            only=tuple(only or ()),
            changes=(*(changes or []), *text),
            samples=samples,
            lengths=tuple(lengths.split(",")) if lengths else (),
        )
    silence_libraries()
    for folder, order in orders.items():
        if dry_run:
            _print_plan(order, folder, jobs, json_output)
        else:
            _run(order, folder, _rates(tune), jobs, overwrite, json_output)


def _run(order: "Order", folder: Path, tune: list[float], jobs: int, overwrite: bool, json_output: bool) -> None:
    """Run one study and print its page."""
    from mnemon.files import read_text
    from mnemon.studies.results import PAGE, reproduce

    results = reproduce(
        order,
        folder,
        tune=tune,
        jobs=jobs,
        overwrite=overwrite,
        command=command_line(sys.argv),
        report=_report,
    )
    print(json.dumps({"output": str(folder), **results}) if json_output else read_text(folder / PAGE))


def _report(text: str) -> None:
    """Say on stderr how far the work is; stdout belongs to the result."""
    print(text, file=sys.stderr, flush=True)


def _rates(text: str | None) -> list[float]:
    """Read the learning rates of `--tune`."""
    try:
        rates = sorted({float(word) for word in text.split(",")}) if text is not None else []
    except ValueError:
        rates = [0.0]
    if any(rate <= 0 for rate in rates):
        raise ConfigError(f"--tune {text}: expected learning rates above 0 such as 0.001,0.003")
    return rates


def _text_change(recipe: str, study: str, background: str | None, ignored: bool) -> list[str]:
    """Return the change that `--background` means; whether a study without text is none of its business."""
    if background is None:
        return []
    from mnemon.training.recipe_io import load_recipe

    if load_recipe(recipe).data.kind == "mqar":
        if ignored:
            return []
        raise ConfigError(f"--background says nothing about {study}, which reads no text; leave it out")
    return [f"data.background={json.dumps(background)}"]


def _print_plan(order: "Order", folder: Path, jobs: int, as_json: bool) -> None:
    from mnemon.studies.dry_run import dry_run

    plan = dry_run(order, folder, _report)
    if as_json:
        print(json.dumps(plan))
        return
    for row in plan["runs"]:
        print(f"{row['name']}: {', '.join(_facts(row, plan['length']))}")
        for line in row.get("launch", ()):
            print(f"    {line}")
    print(f"{len(plan['runs'])} runs, {plan['total_tokens']:,} tokens of training in all{_equality(plan)}")
    if all("seconds" in row for row in plan["runs"]):
        left = [row["seconds"] for row in plan["runs"] if not row["finished"]]
        hours = sum(left) / 3600
        longest = max([sum(left) / jobs, *left]) / 3600 if left else 0.0
        print(f"{len(left)} of them left: about {hours:.2f} core hours, {longest:.2f} hours with --jobs {jobs}")


def _facts(row: dict[str, Any], length: int) -> list[str]:
    """Say in words what the plan knows about a run."""
    total, active = row["parameters"]["total"], row["parameters"]["active"]
    facts = [f"{total:,} parameters" + (f", {active:,} active" if active != total else ""), f"{row['tokens']:,} tokens"]
    if "state_bytes" in row:
        facts.append(f"{row['state_bytes']:,} bytes of state after {length:,} tokens")
    if "seconds" in row:
        facts.append("finished" if row["finished"] else f"{row['seconds'] / 60:.1f} minutes ({row['from']})")
    if "flop" in row:
        facts.append(f"{row['flop']:.1e} FLOP")
    if "data" in row:
        facts.append("data opens: " + ", ".join(f"{task} {tokens:,} tokens" for task, tokens in row["data"].items()))
    return facts


def _equality(plan: dict[str, Any]) -> str:
    """Say how equal the models are where they have to be."""
    if not plan["equal_parameters"]:
        return ""
    totals = [row["parameters"]["total"] for row in plan["runs"]]
    return f", the same for each; parameters differ by at most {100 * (max(totals) / min(totals) - 1):.1f} %"
