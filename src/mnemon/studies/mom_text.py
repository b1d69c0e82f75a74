"""The study `mom-text`: language modelling with one memory per layer, with a mixture, and with attention."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mnemon.evaluation.tables import Grid
from mnemon.files import complete_folder, read_text
from mnemon.metrics.perplexity import FACTORS
from mnemon.studies import memory_arms
from mnemon.studies.execution import read_json
from mnemon.studies.study import Json, PlannedRun, Scale, Study, Variant
from mnemon.training.build import build_tokenizer
from mnemon.training.recipe import Recipe
from mnemon.training.run import LOG_FILE, SUMMARY_FILE

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

_TINY = (
    "model.base.hidden_size=16",
    "model.base.intermediate_size=16",
    "model.base.num_hidden_layers=1",
    "model.base.num_attention_heads=2",
    "model.base.num_key_value_heads=2",
    "model.mom.num_heads=2",
    "model.mom.head_dim=8",
    "tokenizer.vocab_size=320",
    "data.length=16",
    "evaluation.samples=2",
    "optimisation.batch_tokens=256",
    "optimisation.max_tokens=2048",
    "optimisation.warmup_steps=2",
    "output.log_every_steps=2",
)


class MomText(Study):
    """Loss while training, and perplexity over context length, for every update rule single and as a mixture."""

    name = "mom-text"
    title = "Mixtures of memories on plain text"
    recipe = "text-study"
    scales: ClassVar[Mapping[str, Scale]] = {
        "tiny": Scale(_TINY, seeds=1, samples=2, rules=("gated_delta_net", "gla")),
        "small": Scale(("evaluation.samples=32",), seeds=3, samples=32),
    }

    def variants(self, base: Recipe, rules: Sequence[str]) -> tuple[Variant, ...]:
        """Return attention, and two arms per rule."""
        arms = [arm(rule) for rule in rules for arm in (memory_arms.single, memory_arms.mixture)]
        return (memory_arms.attention(), *arms)

    def prepare(self, base: Recipe, root: Path) -> tuple[str, ...]:
        """Train the tokenizer once for all runs, unless the recipe names one."""
        if base.tokenizer_source is not None:
            return ()
        folder = root.resolve() / "tokenizer"
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

    def measure(self, run: PlannedRun, folder: Path) -> Json:
        """Take over the perplexities measured at the end of the run, and its loss over the tokens read."""
        table = read_json(folder / SUMMARY_FILE)["validation"]
        cells = [table[str(length)]["text"] for length in self.lengths(run.recipe)]
        return {"cells": cells, "curve": _curve(_log(folder), run.recipe.output.log_every_steps)}

    def score(self, folder: Path) -> float:
        """Return the negative training loss over the last quarter of the run: held-out text is for the report."""
        entries = _log(folder)
        steps = np.array([entry["step"] for entry in entries])
        late = steps > 0.75 * steps[-1]
        losses = np.array([entry["loss"] for entry in entries])
        return -float(np.average(losses[late], weights=np.diff(steps, prepend=0)[late]))

    def analyse(self, variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> Json:
        """Add a row per length and the loss curve to every variant; compare mixture and single memory seed by seed."""
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
        by_name = {variant["name"]: variant for variant in variants}
        return {
            "comparisons": [
                {"rule": rule, "by_length": _differences(by_name[f"{rule}.mom"], by_name[f"{rule}.single"])}
                for rule in dict.fromkeys(variant["rule"] for variant in variants)
                if f"{rule}.mom" in by_name and f"{rule}.single" in by_name
            ]
        }

    def body(self, results: Json) -> list[str]:
        """Return the table of perplexities, and mixtures beside single memories."""
        recipe = results["recipe"]
        base, mom = recipe["model"]["base"], recipe["model"]["mom"]
        shared = " and a shared one" if mom["shared_memory"] else ""
        lines = [
            f"A Llama of {base['num_hidden_layers']} blocks of width {base['hidden_size']} reads "
            f"`{recipe['data']['background']}` in blocks of {recipe['data']['length']:,} tokens. *Attention* is the "
            f"decoder as it is; *single* has one memory in the place of each attention, *mom* {mom['num_memories']} of "
            f"which a token goes to {mom['top_k']}{shared}. Mixtures have more parameters than single memories, in all "
            "and active for a token: the table says how many.",
            "",
            "## Perplexity of held-out text",
            "",
            "Mean over the seeds, in brackets the smallest and the largest; all lengths on the same tokens.",
            "",
            _perplexity_grid(results["variants"]).markdown(),
        ]
        if results["comparisons"]:
            note = "Bits per byte of the mixture minus the single memory, seed by seed; below 0 the mixture is better."
            lines += ["## Mixture against single memory", "", note, "", _comparison_grid(results).markdown()]
        return lines

    def figures(self, results: Json) -> list[Plot]:
        """Draw the loss curves, one panel per rule."""
        from mnemon.studies.figures import loss_curves

        return [loss_curves(results["variants"])]


def _log(folder: Path) -> list[Json]:
    return [json.loads(line) for line in read_text(folder / LOG_FILE).splitlines()]


def _curve(entries: Sequence[Json], every: int) -> list[list[float]]:
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


def _differences(mixture: Json, single: Json) -> list[Json]:
    pairs = zip(mixture["rows"], single["rows"], strict=True)
    return [
        {"length": a["length"], "by_seed": [x - y for x, y in zip(a["bits_per_byte"], b["bits_per_byte"], strict=True)]}
        for a, b in pairs
    ]


def _perplexity_grid(variants: Sequence[Json]) -> Grid:
    lengths = [row["length"] for row in variants[0]["rows"]]
    longest = str(max(lengths))
    head = (
        "rule",
        "arm",
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
            f"{variant['state_bytes'][longest]:,}",
            f"{variant['learning_rate']:g}",
            f"{variant['tokens'][0]:,}",
            f"{len(variant['tokens'])}",
        )
        cells = [_spread(row["perplexity"], 1) for row in variant["rows"]]
        lines.append((variant["rule"], variant["arm"], *facts, *cells, _spread(variant["rows"][0]["bits_per_byte"], 3)))
    return Grid(head, tuple(lines))


def _comparison_grid(results: Json) -> Grid:
    comparisons = results["comparisons"]
    head = ("rule", "arms", *(f"at {entry['length']:,}" for entry in comparisons[0]["by_length"]))
    lines = [
        (
            comparison["rule"],
            "mom − single",
            *(" ".join(f"{value:+.3f}" for value in entry["by_seed"]) for entry in comparison["by_length"]),
        )
        for comparison in comparisons
    ]
    return Grid(head, tuple(lines))


def _spread(values: Sequence[float], digits: int) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} [{min(values):.{digits}f}–{max(values):.{digits}f}]"
