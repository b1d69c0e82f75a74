"""What studies of language modelling share: one tokenizer, perplexities from the end of the run, the loss over it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnemon.evaluation.harness.published import PUBLISHED
from mnemon.evaluation.paired import SIGNIFICANCE
from mnemon.evaluation.tables import Grid
from mnemon.files import complete_folder, read_text
from mnemon.metrics.intervals import Interval, crossed_bootstrap
from mnemon.metrics.perplexity import FACTORS
from mnemon.studies.comparisons import add_corrected, paired_difference
from mnemon.studies.execution import read_json
from mnemon.studies.study import Json, PlannedRun, Study, state_text
from mnemon.training.build import build_tokenizer
from mnemon.training.recipe import Recipe
from mnemon.training.run import LOG_FILE, SUMMARY_FILE


class Pair(NamedTuple):
    """Two variants that are compared.

    Attributes:
        first: name of the variant whose bits count.
        second: name of the one whose bits are taken off.
        facts: what the comparison is called; `against` among it.
    """

    first: str
    second: str
    facts: Json


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
                "perplexity": _exponential(crossed_bootstrap(_losses_by_window(cells))[0]),
                "bits_per_byte": asdict(crossed_bootstrap(_bits_by_window(cells))[0]),
            }
            for cells in _by_length(runs)
        ]
        curves = np.array([run["curve"] for run in runs]).mean(axis=0)
        variant["curve"] = [[int(tokens), float(loss)] for tokens, loss in curves]


def compare(variants: Sequence[Json], measures: Mapping[str, Sequence[Json]], pairs: Sequence[Pair]) -> list[Json]:
    """Compare variants on the same windows of text, at every length.

    Args:
        variants: with their rows.
        measures: per variant and seed, with the loss of every window.
        pairs: which variants, and what else to say of the comparison.

    Returns:
        Per pair what was said of it, and `by_length`: bits per byte of the first minus those of the second
        (`difference`, with its 95 % interval over seeds and windows), `by_seed`, `p_value` and `corrected_p`: Holm over
        all pairs that are `against` the same, per length.
    """
    rows = {variant["name"]: variant["rows"] for variant in variants}
    bits = {name: [_bits_by_window(cells) for cells in _by_length(runs)] for name, runs in measures.items()}
    found = []
    for pair in pairs:
        tests = [
            {"length": row["length"], **paired_difference(ours, theirs)}
            for row, ours, theirs in zip(rows[pair.first], bits[pair.first], bits[pair.second], strict=True)
        ]
        found.append({**pair.facts, "by_length": tests})
    for against in dict.fromkeys(entry["against"] for entry in found):
        families = [entry["by_length"] for entry in found if entry["against"] == against]
        for family in zip(*families, strict=True):
            add_corrected(family)
    return found


def comparison_grid(
    comparisons: Sequence[Json], names: tuple[str, str], named: Callable[[Json], tuple[str, str]]
) -> Grid:
    """Return the table of differences by length; bold: corrected p below 0.05.

    Args:
        comparisons: from `compare`.
        names: of the first two columns.
        named: their content.
    """
    head = (*names, *(f"at {test['length']:,}" for test in comparisons[0]["by_length"]))
    lines = [(*named(entry), *(_difference_text(test) for test in entry["by_length"])) for entry in comparisons]
    return Grid(head, tuple(lines))


PERPLEXITY_NOTE = (
    "Mean with its 95 % interval over the windows of text and, where there are several, the training seeds (crossed "
    "bootstrap); all lengths on the same tokens."
)
COMPARISON_NOTE = (
    "Bits per byte of the first minus the second, window by window, because windows differ more than models do; below "
    "0 the first is better. 95 % intervals over the windows and, where there are several, the training seeds (crossed "
    "bootstrap); bold: p below 0.05, Holm-corrected over the lines that compare with the same. One seed says nothing "
    "about another one."
)


def sign_of(test: Json) -> int:
    """Say whether the first has fewer bits (-1), more (1), or cannot be told from the second (0).

    Several training seeds must agree.
    """
    signs = {np.sign(value) for value in test["by_seed"]}
    return int(signs.pop()) if len(signs) == 1 and test["corrected_p"] < SIGNIFICANCE else 0


def perplexity_grid(variants: Sequence[Json], names: tuple[str, str], named: Callable[[Json], tuple[str, str]]) -> Grid:
    """Return the table of perplexities by length, with size and training; `PERPLEXITY_NOTE` says how to read it.

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
        cells = [_interval_text(row["perplexity"], 1) for row in variant["rows"]]
        lines.append((*named(variant), *facts, *cells, _interval_text(variant["rows"][0]["bits_per_byte"], 3)))
    return Grid(head, tuple(lines))


def _by_length(runs: Sequence[Json]) -> Iterator[tuple[Json, ...]]:
    """Go through the lengths; of each the cells of all seeds."""
    yield from zip(*(run["cells"] for run in runs), strict=True)


def _losses_by_window(cells: Sequence[Json]) -> NDArray[np.float64]:
    """Return nats per token, [S, windows]."""
    return np.array([cell["loss_by_window"] for cell in cells])


def _bits_by_window(cells: Sequence[Json]) -> NDArray[np.float64]:
    """Return bits per byte, [S, windows]; of the mean number of bytes, so that their mean is that of all the text."""
    per_nat = np.array([cell["bits_per_byte"] / cell["loss"]["mean"] for cell in cells])
    return _losses_by_window(cells) * per_nat[:, None]


def _exponential(interval: Interval) -> Json:
    return {end: math.exp(value) for end, value in asdict(interval).items()}


def _difference_text(test: Json) -> str:
    low, mean, high = (f"{test['difference'][end]:+.3f}" for end in ("low", "mean", "high"))
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if test["corrected_p"] < SIGNIFICANCE else text


def _interval_text(interval: Mapping[str, float], digits: int) -> str:
    low, mean, high = (f"{interval[end]:.{digits}f}" for end in ("low", "mean", "high"))
    return f"{mean} [{low}–{high}]"


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
