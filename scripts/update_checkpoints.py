"""Make finished training runs the checkpoints that ship with the library, under the names of their recipes.

    python scripts/update_checkpoints.py babilong-tiny-lm2=runs/studies/lm2-table1/runs/lm2/lr-0.0007/seed-0

Weights, tokenizer and log are copied as they are; recipe, summary and model card get the name. An earlier checkpoint
of that name is replaced.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mnemon.errors import ConfigError, MnemonError
from mnemon.files import atomic_write_bytes, parse_object, read_bytes, read_text
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import load_recipe, save_recipe
from mnemon.training.run import LOG_FILE, RECIPE_FILE, SUMMARY_FILE, write_summary

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    LOG_FILE,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Replace the checkpoints named on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER", help="name and finished run")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository (default: this one)")
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(checkpoint) for checkpoint in options.checkpoints]
        for recipe, summary, files in runs:
            folder = options.root / "src" / "mnemon" / "checkpoints" / recipe.name
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                atomic_write_bytes(folder / name, data)
            save_recipe(recipe, folder / RECIPE_FILE)
            write_summary(folder, recipe, summary)
            print(folder)
    except MnemonError as error:
        print(f"update_checkpoints: error: {error}", file=sys.stderr)
        return 2
    return 0


def read_run(checkpoint: str) -> tuple[Recipe, dict, dict[str, bytes]]:
    """Return recipe and summary under the new name, and the files that are copied; read before any is written."""
    name, equals, folder = checkpoint.partition("=")
    if not (name and equals and folder) or "/" in name:
        raise ConfigError(f"expected NAME=FOLDER, got {checkpoint!r}")
    path = Path(folder)
    summary = parse_object(read_text(path / SUMMARY_FILE), str(path / SUMMARY_FILE))
    if summary["stop_reason"] == "interrupted" or not summary["validation"]:
        raise ConfigError(f"{path}: the run is not finished; `mnemon train --resume` goes on with it")
    recipe = load_recipe(path / RECIPE_FILE, [f"name={json.dumps(name)}"])
    return recipe, {**summary, "name": name}, {file: read_bytes(path / file) for file in COPIED}


if __name__ == "__main__":
    sys.exit(main())
