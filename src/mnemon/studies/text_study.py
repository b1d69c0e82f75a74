"""What studies of language modelling share: one tokenizer, perplexities from the end of the run, the loss over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mnemon.evaluation.harness.published import PUBLISHED
from mnemon.evaluation.tables import Grid
from mnemon.files import complete_folder, read_text
from mnemon.metrics.perplexity import FACTORS
from mnemon.studies.execution import read_json
from mnemon.studies.study import Json, PlannedRun, Study, state_text
from mnemon.training.build import build_tokenizer
from mnemon.training.recipe import Recipe
from mnemon.training.run import LOG_FILE, SUMMARY_FILE


class TextStudy(Study):
    """A study whose recipes read plain text; its measures are `cells` (perplexities) and `curve` (training loss)."""

    tunable = True

    def prepare(self, base: Recipe, root: Path) -> tuple[str, ...]:
        """Train the tokenizer once for all runs, unless the recipe names one."""
        if base.tokenizer_source is not None:
            return ()
        folder = root / "tokenizer"
        if not folder.is_dir():
            tokenizer = build_tokenizer(base)
            assert tokenizer is not None  # text has one
            with complete_folder(folder) as target:
                tokenizer.save_pretrained(target)
        size = len(read_json(folder / "tokenizer.json")["model"]["vocab"])
        return (f"tokenizer.path={json.dumps(str(folder))}", f"tokenizer.vocab_size={size}")

    def lengths(self, recipe: Recipe) -> list[int]:
        """Return the lengths at which perplexity is measured."""
        return sorted(recipe.evaluation.lengths or (factor * recipe.data.stages[0].length for factor in FACTORS))

    def tokens_read(self, run: PlannedRun) -> int:
        """Return the tokens of the held-out windows, read once per length."""
        lengths = self.lengths(run.recipe)
        return run.recipe.evaluation.samples * max(lengths) * len(lengths)

    def measure(self, run: PlannedRun, folder: Path) -> Json:
        """Take over the perplexities measured at the end of the run, and its loss over the tokens read."""
        table = read_json(folder / SUMMARY_FILE)["validation"]
        cells = [table[str(length)]["text"] for length in self.lengths(run.recipe)]
        return {"cells": cells, "curve": loss_curve(_log(folder), run.recipe.output.log_every_steps)}

    def score(self, folder: Path) -> float:
        """Return the negative training loss over the last quarter of the run: held-out text is for the report."""
        entries = _log(folder)
        steps = np.array([entry["step"] for entry in entries])
        late = steps > 0.75 * steps[-1]
        losses = np.array([entry["loss"] for entry in entries])
        return -float(np.average(losses[late], weights=np.diff(steps, prepend=0)[late]))


def loss_curve(entries: Sequence[Json], every: int) -> list[list[float]]:
    """Return tokens read and mean loss for every so many steps, whatever checkpoints have cut the log into.

    Args:
        entries: lines of the log in order; the loss of each is the mean over the steps since the one before.
        every: steps.
    """
    steps = np.array([entry["step"] for entry in entries])
    summed = np.cumsum(np.diff(steps, prepend=0) * [entry["loss"] for entry in entries])
    ends = [number for number, step in enumerate(steps) if step % every == 0 or number == len(steps) - 1]
    means = np.diff(summed[ends], prepend=0.0) / np.diff(steps[ends], prepend=0)
    return [[entries[end]["tokens"], float(mean)] for end, mean in zip(ends, means, strict=True)]


def add_text_rows(variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> None:
    """Add to every variant a row per length and the loss curve, its mean over the seeds."""
    for variant in variants:
        runs = measures[variant["name"]]
        variant["rows"] = [
            {
                "length": cells[0]["length"],
                "samples": cells[0]["samples"],
                "perplexity": [cell["perplexity"]["mean"] for cell in cells],
                "bits_per_byte": [cell["bits_per_byte"] for cell in cells],
            }
            for cells in zip(*(run["cells"] for run in runs), strict=True)
        ]
        curves = np.array([run["curve"] for run in runs]).mean(axis=0)
        variant["curve"] = [[int(tokens), float(loss)] for tokens, loss in curves]


def differences(first: Json, second: Json) -> list[Json]:
    """Return bits per byte of one variant minus those of another, seed by seed, for every length."""
    pairs = zip(first["rows"], second["rows"], strict=True)
    return [
        {"length": a["length"], "by_seed": [x - y for x, y in zip(a["bits_per_byte"], b["bits_per_byte"], strict=True)]}
        for a, b in pairs
    ]


def perplexity_grid(variants: Sequence[Json], names: tuple[str, str], named: Callable[[Json], tuple[str, str]]) -> Grid:
    """Return the table of perplexities by length, with size and training.

    Args:
        variants: with their rows.
        names: of the first two columns.
        named: their content.
    """
    lengths = [row["length"] for row in variants[0]["rows"]]
    head = (
        *names,
        "parameters",
        "active",
        "state, bytes",
        "learning rate",
        "tokens",
        "seeds",
        *(f"perplexity at {length:,}" for length in lengths),
        f"bits per byte at {lengths[0]:,}",
    )
    lines = []
    for variant in variants:
        facts = (
            f"{variant['parameters']['total']:,}",
            f"{variant['parameters']['active']:,}",
            state_text(variant),
            f"{variant['learning_rate']:g}",
            f"{variant['tokens'][0]:,}",
            f"{len(variant['tokens'])}",
        )
        cells = [_spread(row["perplexity"], 1) for row in variant["rows"]]
        lines.append((*named(variant), *facts, *cells, _spread(variant["rows"][0]["bits_per_byte"], 3)))
    return Grid(head, tuple(lines))


def _spread(values: Sequence[float], digits: int) -> str:
    """Write the mean over seeds with the smallest and the largest value."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} [{min(values):.{digits}f}–{max(values):.{digits}f}]"


def _log(folder: Path) -> list[Json]:
    return [json.loads(line) for line in read_text(folder / LOG_FILE).splitlines()]


def published_lines(suite: str, what: str, note: str) -> list[str]:
    """Return the lines of a page with the published numbers of a suite.

    Args:
        suite: a key of `mnemon.evaluation.harness.published.PUBLISHED`.
        what: heading of the table.
        note: how to read the numbers.
    """
    rows = PUBLISHED[suite]
    columns = list(rows[0].values)
    lines = [(row.model, row.size, *(f"{row.values[name]:g}" for name in columns)) for row in rows]
    grid = Grid(("model", "size", *columns), tuple(lines))
    sources = ", ".join(dict.fromkeys(row.source for row in rows))
    return [f"## {what}, published", "", f"{sources}. {note}", "", grid.markdown()]
