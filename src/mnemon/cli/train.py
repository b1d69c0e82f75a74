"""`mnemon train`: train a model as a recipe says."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mnemon.cli.options import JsonOption, OverwriteOption, ResumeOption


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

    checked = load_recipe(recipe, changes)
    from mnemon.training.run import output_folder, plan
    from mnemon.training.run import train as run

    if dry_run:
        _print_plan(plan(checked), json_output)
        return
    summary = run(checked, output, overwrite=overwrite, resume=resume)
    if summary["stop_reason"] == "interrupted":
        print(f"stopped and saved at step {summary['steps']}; go on with --resume", file=sys.stderr)
        raise typer.Exit(130)
    if json_output:
        print(json.dumps(summary))
        return
    done = f"{summary['tokens']:,} tokens in {summary['minutes']} minutes, ended by {summary['stop_reason']}"
    print(f"{output_folder(checked, output)}: {done}")
    _print_validation(summary["validation"])


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    import yaml

    if as_json:
        print(json.dumps(plan))
        return
    print(yaml.safe_dump(plan["recipe"], sort_keys=False).rstrip())
    print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in plan["parameters"].items()))


def _print_validation(table: dict[str, Any]) -> None:
    """Print the held-out accuracy, one line per length."""
    for length, row in table.items():
        cells = "  ".join(f"{task} {100 * cell['right'] / cell['asked']:3.0f} %" for task, cell in row.items())
        print(f"{length:>8} tokens  {cells}")
