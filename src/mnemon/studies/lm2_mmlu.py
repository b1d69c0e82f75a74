"""The study `lm2-mmlu`: does the memory harm a general skill?

Small models know no facts that MMLU asks for. What stands for it has the same form, four choices of which a model takes
the likeliest: which of four passages follows a passage of held-out text. Nothing of it was made for a memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mnemon.data.background import load_background
from mnemon.data.text import encode_background
from mnemon.evaluation.checkpoints import load_spec
from mnemon.evaluation.paired import mean_interval
from mnemon.evaluation.tables import Grid, p_text
from mnemon.metrics.perplexity import token_losses
from mnemon.studies.babilong_tables import paired
from mnemon.studies.equal_size import as_large_as
from mnemon.studies.study import Claim, Json, PlannedRun, Scale, Variant, points_text
from mnemon.studies.text_study import (
    COMPARISON_NOTE,
    PERPLEXITY_NOTE,
    Pair,
    TextStudy,
    add_text_rows,
    compare,
    comparison_grid,
    perplexity_grid,
    published_lines,
    sign_of,
)
from mnemon.training.data_sections import TextData
from mnemon.training.recipe import Recipe
from mnemon.training.trainer import wants_cuda

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

CHOICES = 4
_ANSWER_SHARE = 8
"""A choice is this part of a block of text, what stands before it the rest."""

_SEED = 2**20
_CLAIM = "The memory costs nothing where it is not needed: 29.4 % on MMLU, 28.0 without it (LM2, Table 2)"
_SIGNS = {-1: "has fewer bits than", 1: "has more bits than", 0: "cannot be told from"}
_TEXT = "data={kind: text, background: stdlib, length: 2048}"


class Lm2Mmlu(TextStudy):
    """Which of four passages follows, asked of a plain decoder and of an LM2 of the same size and training."""

    name = "lm2-mmlu"
    title = "A general skill with and without memory"
    recipe = "lm2-text-study"
    scales: ClassVar[Mapping[str, Scale]] = {
        "tiny": Scale(("optimisation.max_tokens=1000000",), seeds=1, samples=200),
        "small": Scale((), seeds=3, samples=200),
        "paper": Scale((_TEXT, "evaluation.samples=2"), seeds=1, samples=200, recipe="lm2-1.7b", launched=True),
    }
    equal_parameters = True

    def variants(self, base: Recipe, scale: Scale) -> tuple[Variant, ...]:
        """Return the plain decoder, with wider feed-forward layers, and LM2."""
        plain = as_large_as(base, ("model.kind=plain", "model.lm2=null"))
        return Variant("plain", "", "plain", plain), Variant("lm2", "", "LM2", ())

    def tokens_read(self, run: PlannedRun) -> int:
        """Return the tokens of the held-out windows and of all choices with what stands before them."""
        return super().tokens_read(run) + run.samples * CHOICES * run.recipe.data.stages[0].length

    def measure(self, run: PlannedRun, folder: Path) -> Json:
        """Add to the perplexities which questions were answered rightly."""
        data = run.recipe.data
        assert isinstance(data, TextData)
        device = "cuda" if wants_cuda(run.recipe.optimisation) else "cpu"
        spec = load_spec(run.name, str(folder), device=device)
        stream = encode_background(load_background(data.background, "test"), spec.tokenizer)
        blocks = stream.windows(data.length, run.samples).ids
        return {**super().measure(run, folder), "right": choose(spec.model, blocks).tolist()}

    def analyse(self, variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> Json:
        """Add perplexities and accuracy to every variant; compare LM2 with the plain decoder question by question."""
        add_text_rows(variants, measures)
        marks = {name: np.array([run["right"] for run in runs], dtype=np.float64) for name, runs in measures.items()}
        for variant in variants:
            variant["accuracy"] = asdict(mean_interval(marks[variant["name"]]))
            variant["questions"] = marks[variant["name"]].shape[1]
        if not {"lm2", "plain"} <= set(marks):
            return {"comparisons": [], "text": []}
        text = compare(variants, measures, [Pair("lm2", "plain", {"against": "plain"})])
        return {"comparisons": [paired(marks["lm2"], marks["plain"])], "text": text}

    def body(self, results: Json) -> list[str]:
        """Return what was asked, the accuracies and their difference, the published numbers, and perplexities."""
        recipe = results["recipe"]
        length = recipe["data"]["length"]
        answer = length // _ANSWER_SHARE
        lines = [
            f"Four passages of {answer} tokens, one of which follows {length - answer} tokens of held-out text "
            f"(`{recipe['data']['background']}`), the others follow other passages; a model answers with the one it "
            "finds likeliest. Chance is 25 %. The form is that of MMLU, the knowledge is not: models of this size "
            "answer MMLU by chance. Both have the same text, tokens and, within 2 %, parameters.",
            "",
            _accuracy_grid(results["variants"]).markdown(),
        ]
        if results["comparisons"]:
            lines += [*_sentence(results["comparisons"][0]), ""]
        lines += published_lines("mmlu", "MMLU", "Accuracy in percent; models, training and questions are others.")
        grid = perplexity_grid(results["variants"], ("model", "text"), lambda v: (v["arm"], "held out"))
        lines += ["## Perplexity", "", PERPLEXITY_NOTE, "", grid.markdown()]
        if results["text"]:
            differences = comparison_grid(results["text"], ("model", "against"), lambda e: ("LM2", e["against"]))
            lines += ["## Bits per byte", "", COMPARISON_NOTE, "", differences.markdown()]
        return lines

    def findings(self, results: Json) -> list[str]:
        """Say what the memory costs."""
        found = [f"Which passage follows: {line}" for test in results["comparisons"] for line in _sentence(test)]
        return found + [_text_sentence(entry["by_length"][0]) for entry in results["text"]]

    def claims(self, results: Json) -> list[Claim]:
        """Say whether memory is shown to help or to harm a skill that does not need it."""
        return [Claim(_CLAIM, _verdict(test)) for test in results["comparisons"]]

    def summary(self, results: Json) -> list[str]:
        """Return the accuracies."""
        return [_accuracy_grid(results["variants"]).markdown()]

    def figures(self, results: Json) -> list[Plot]:
        """Draw the loss curves."""
        from mnemon.studies.figures import loss_lines

        return [loss_lines(results["variants"], "model")]


def choose(model: Any, blocks: NDArray[Any]) -> NDArray[np.bool_]:
    """Ask a model which of four passages follows, and say where it is right.

    The wrong passages of a block are the ends of three other blocks, the same ones for every model.

    Args:
        model: causal language model in evaluation mode.
        blocks: token ids, [N, T], N at least 4; the last eighth of a block is what follows.

    Returns:
        [N].
    """
    count, length = blocks.shape
    answer = length // _ANSWER_SHARE
    rng = np.random.default_rng(_SEED)
    shifts = np.array([rng.choice(np.arange(1, count), CHOICES - 1, replace=False) for _ in range(count)])
    sources = np.concatenate([np.zeros((count, 1), dtype=int), shifts], axis=1)
    ends = blocks[(np.arange(count)[:, None] + sources) % count, length - answer :]
    starts = np.broadcast_to(blocks[:, None, : length - answer], (count, CHOICES, length - answer))
    asked = np.concatenate([starts, ends], axis=2).reshape(count * CHOICES, length)
    losses = token_losses(model, asked)[:, -answer:].sum(axis=1).reshape(count, CHOICES)
    right: NDArray[np.bool_] = losses[:, 0] < losses[:, 1:].min(axis=1)
    return right


def _sentence(test: Json) -> list[str]:
    seeds = len(test["by_seed"])
    return [
        f"LM2 minus plain, in points: {points_text(test)}, p {p_text(test['p_value'])}, {seeds} seed(s), on the same "
        f"questions. A loss of more than {max(0.0, -100 * test['difference']['low']):.1f} points is excluded by the "
        "interval" + ("." if seeds > 1 else "; another training seed may differ."),
    ]


def _text_sentence(test: Json) -> str:
    low, mean, high = (f"{test['difference'][end]:+.3f}" for end in ("low", "mean", "high"))
    return (
        f"The same text: LM2 {_SIGNS[sign_of(test)]} plain of the same size: {mean} bits per byte "
        f"[{low}, {high}] at {test['length']:,} tokens, {len(test['by_seed'])} seed(s)."
    )


def _verdict(test: Json) -> str:
    low, high = 100 * test["difference"]["low"], 100 * test["difference"]["high"]
    if low > 0:
        return f"Holds: at least {low:.1f} points better."
    if high < 0:
        return f"Does not hold: at least {-high:.1f} points worse."
    return (
        f"No difference shown; a gain of more than {high:.1f} and a loss of more than {-low:.1f} points are excluded."
    )


def _accuracy_grid(variants: Sequence[Json]) -> Grid:
    lines = []
    for variant in variants:
        low, mean, high = (f"{100 * variant['accuracy'][end]:.1f}" for end in ("low", "mean", "high"))
        facts = (f"{variant['parameters']['total']:,}", f"{variant['tokens'][0]:,}", f"{len(variant['tokens'])}")
        lines.append((variant["arm"], f"{variant['questions']}", *facts, f"{mean} [{low}–{high}]"))
    return Grid(("model", "questions", "parameters", "tokens", "seeds", "answered rightly, %"), tuple(lines))
