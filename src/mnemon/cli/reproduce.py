"""`mnemon reproduce`: run a study, or what is left of it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mnemon.cli.display import command_line, silence_libraries
from mnemon.cli.options import JsonOption, OverwriteOption
from mnemon.errors import ConfigError


def reproduce(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="mom-mqar or mom-text.")],
    scale: Annotated[str, typer.Option(help="tiny (does it run? seconds) or small.")] = "small",
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds per variant. (default: the scale's)")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Variants to run, such as 'gla.*'; repeatable.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of all runs' recipes; repeatable."),
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Text of mom-text: stdlib, a folder of .txt files, or hf:NAME.")
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(metavar="RATE,RATE,...", help="Choose every variant's learning rate from these, on seed 0."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, one thread each.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the study. (default: runs/studies/STUDY)")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every run and its size; train nothing.")] = False,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Run a study: `mnemon reproduce mom-mqar --scale tiny`.

    What is finished in the output folder is kept and what was interrupted goes on, so that the same command given again
    completes a study. The folder gets results.json, page.md and figures.
    """
    from mnemon.studies.registry import get_study

    wanted = [*(changes or []), *_text_change(get_study(study).recipe, study, background)]
    silence_libraries()
    if dry_run:
        _print_plan(study, scale, seeds, only or [], wanted, json_output)
        return
    from mnemon.files import read_text
    from mnemon.studies.results import PAGE
    from mnemon.studies.results import reproduce as run

    folder = output or Path("runs/studies") / study
    results = run(
        study,
        scale,
        folder,
        seeds=seeds,
        only=only or [],
        changes=wanted,
        tune=_rates(tune),
        jobs=jobs,
        overwrite=overwrite,
        command=command_line(sys.argv),
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(json.dumps({"output": str(folder), **results}) if json_output else read_text(folder / PAGE))


def _rates(text: str | None) -> list[float]:
    """Read the learning rates of `--tune`."""
    try:
        rates = sorted({float(word) for word in text.split(",")}) if text is not None else []
    except ValueError:
        rates = [0.0]
    if any(rate <= 0 for rate in rates):
        raise ConfigError(f"--tune {text}: expected learning rates above 0 such as 0.001,0.003")
    return rates


def _text_change(recipe: str, study: str, background: str | None) -> list[str]:
    """Return the change that `--background` means."""
    if background is None:
        return []
    from mnemon.training.recipe_io import load_recipe

    if load_recipe(recipe).data.kind != "text":
        raise ConfigError(f"--background says nothing about {study}, which reads no text; leave it out")
    return [f"data.background={json.dumps(background)}"]


def _print_plan(study: str, scale: str, seeds: int | None, only: list[str], changes: list[str], as_json: bool) -> None:
    from mnemon.studies.results import dry_run

    plan: dict[str, Any] = dry_run(study, scale, seeds, only, changes)
    if as_json:
        print(json.dumps(plan))
        return
    for row in plan["runs"]:
        total, active = row["parameters"]["total"], row["parameters"]["active"]
        print(
            f"{row['name']}: {total:,} parameters, {active:,} active, {row['state_bytes']:,} bytes of state after "
            f"{plan['length']:,} tokens, {row['tokens']:,} tokens"
        )
    print(f"{len(plan['runs'])} runs, {plan['total_tokens']:,} tokens in all")
