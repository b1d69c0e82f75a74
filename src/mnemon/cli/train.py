"""`mnemon train`: train a model as a recipe says."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli.options import JsonOption, OverwriteOption, ResumeOption

if TYPE_CHECKING:
    from mnemon.training import Recipe


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships with mnemon.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one key, such as optimisation.max_minutes=10; repeatable."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run (default: the recipe's, else runs/NAME).")
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and the parameter counts; train nothing.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Train a model from a recipe: `mnemon train babilong-tiny-lm2 --set optimisation.max_minutes=10`."""
    from mnemon.training.recipe_io import load_recipe

    if "WORLD_SIZE" not in os.environ:
        _train(load_recipe(recipe, changes), output, resume, overwrite, dry_run, json_output)
        return
    from mnemon.training.distributed import joined_processes

    with joined_processes() as processes:  # connected first, so that a mistake in the recipe is told once
        checked = processes.from_main(lambda: load_recipe(recipe, changes))
        _train(checked, output, resume, overwrite, dry_run, json_output, is_main=processes.is_main)


def _train(
    recipe: "Recipe",
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    json_output: bool,
    is_main: bool = True,
) -> None:
    """Train or plan; of several processes only the main one prints."""
    from mnemon.training.run import output_folder, plan
    from mnemon.training.run import train as run

    if dry_run:
        if is_main:
            _print_plan(plan(recipe), json_output)
        return
    summary = run(recipe, output, overwrite=overwrite, resume=resume)
    if not is_main:
        return
    if summary["stop_reason"] == "interrupted":
        print(f"stopped and saved at step {summary['steps']}; go on with --resume", file=sys.stderr)
        raise typer.Exit(130)
    if json_output:
        print(json.dumps(summary))
        return
    done = f"{summary['tokens']:,} tokens in {summary['minutes']} minutes, ended by {summary['stop_reason']}"
    print(f"{output_folder(recipe, output)}: {done}")
    _print_validation(summary["validation"])


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    import yaml

    if as_json:
        print(json.dumps(plan))
        return
    print(yaml.safe_dump(plan["recipe"], sort_keys=False).rstrip())
    print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in plan["parameters"].items()))


def _print_validation(table: dict[str, Any]) -> None:
    """Print what was measured on held-out samples, one line per length."""
    from mnemon.training.model_card import cell_text

    for length, row in table.items():
        cells = "  ".join(f"{name} {cell_text(cell)}{_unit(cell)}" for name, cell in row.items())
        print(f"{length:>8} tokens  {cells}")


def _unit(cell: dict[str, Any]) -> str:
    return "" if "perplexity" in cell else " %"
