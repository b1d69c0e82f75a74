"""The study `lm2-ablation`: which choices in LM2's memory matter? BABILong, one change at a time.

Every variant is the base recipe with one change, trained on the same number of tokens and asked the same questions
about texts longer than those it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mnemon.evaluation.checkpoints import load_spec
from mnemon.evaluation.paired import SIGNIFICANCE, mean_interval
from mnemon.evaluation.results import result_from_dict
from mnemon.evaluation.samples import parse_length
from mnemon.evaluation.statistics import holm
from mnemon.evaluation.suite import evaluate_models
from mnemon.evaluation.tables import Grid, p_text
from mnemon.studies.babilong_tables import Answers, Marks, accuracy_grid, model_rows, paired
from mnemon.studies.lm2_table1 import suite_options
from mnemon.studies.study import Json, PlannedRun, Scale, Study, Variant, state_text
from mnemon.training.data_sections import BabilongData
from mnemon.training.recipe import LM2Options, Recipe
from mnemon.training.trainer import wants_cuda

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

BASE = "base"


class Lm2Ablation(Study):
    """LM2 with one change at a time, compared question by question with LM2 as it is."""

    name = "lm2-ablation"
    title = "Which choices in LM2's memory matter on BABILong"
    recipe = "babilong-tiny-lm2"
    scales: ClassVar[Mapping[str, Scale]] = {
        "tiny": Scale((), seeds=1, samples=30, lengths=("4k", "16k", "64k")),
        "small": Scale(
            ("optimisation.max_minutes=null",),
            seeds=3,
            samples=30,
            recipe="babilong-small-lm2",
            lengths=("8k", "16k", "64k"),
        ),
    }

    def variants(self, base: Recipe, scale: Scale) -> tuple[Variant, ...]:
        """Return the base and every change that differs from it."""
        assert base.model.lm2 is not None
        assert isinstance(base.data, BabilongData)
        found = {**_memory_changes(base.model.lm2), **_data_changes(base.data)}
        blocks = (base.model.base or {}).get("layer_types", ())
        if sum(kind != "conv" for kind in blocks) > 1:
            found["flow.layer"] = ("one bank per block", ("model.lm2.flow=layer",))
        changed = (Variant(name, "", what, changes) for name, (what, changes) in found.items())
        return (Variant(BASE, "", "as it is", ()), *changed)

    def lengths(self, recipe: Recipe) -> list[int]:
        """Return the longest length of the training."""
        return [recipe.data.stages[-1].length]

    def tokens_read(self, run: PlannedRun) -> int:
        """Return the tokens of all questions."""
        return len(run.recipe.data.task_names) * run.samples * sum(parse_length(length) for length in run.lengths)

    def measure(self, run: PlannedRun, folder: Path) -> Json:
        """Ask the same questions of every run, as many at every length."""
        device = "cuda" if wants_cuda(run.recipe.optimisation) else "cpu"
        spec = load_spec(run.variant.name, str(folder), device=device, source=run.source)
        options = suite_options(run, run.lengths, samples_at={})
        found = evaluate_models([spec], options, cells_folder=folder / "cells").results
        return {"results": [asdict(result) for result in found]}

    def analyse(self, variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> Json:
        """Return rows per variant, and the difference of each to the base over all lengths; Holm over the variants."""
        seeds = range(len(next(iter(measures.values()))))
        by_seed = [
            [[result_from_dict(value) for runs in measures.values() for value in runs[seed]["results"]]]
            for seed in seeds
        ]
        answers = Answers(by_seed)
        rows = model_rows(answers)
        for row in rows:
            row["all"] = asdict(mean_interval(_all_marks(answers, row["label"])))
        return {"tasks": list(answers.tasks), "rows": rows, "comparisons": _compare(answers)}

    def body(self, results: Json) -> list[str]:
        """Return what was changed, what it did, and the accuracies by task and length."""
        rows = {row["label"]: row for row in results["rows"]}
        lengths = list(next(iter(rows.values()))["cells"])
        trained = max(row["training"]["trained_length"] for row in rows.values())
        samples = next(iter(next(iter(rows.values()))["cells"].values()))["samples"]
        lines = [
            f"`{results['recipe']['name']}` with one change at a time, the same number of training tokens each. The "
            f"same {samples} questions of every task at every length ({', '.join(lengths)}); the longest training "
            f"texts have {trained:,} tokens. *all* is the mean over tasks and lengths in percent, *difference* that of "
            "the changed model to the base in points, with 95 % intervals, on the same questions: with one training "
            "seed over questions (paired bootstrap, McNemar's exact test), with several over seeds and questions "
            "(crossed bootstrap). Holm-corrected over all lines; bold: below 0.05. One seed says nothing about others.",
            "",
            _change_grid(results, lengths).markdown(),
        ]
        if results["comparisons"]:
            lines += [*_sentences(results["comparisons"]), ""]
        return [
            *lines,
            "## By task",
            "",
            accuracy_grid(results["rows"], results["tasks"], with_published=False).markdown(),
        ]

    def figures(self, results: Json) -> list[Plot]:
        """Draw the differences to the base."""
        from mnemon.studies.figures import differences_to

        return [differences_to(BASE, results["comparisons"])] if results["comparisons"] else []


def _memory_changes(lm2: LM2Options) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return what may be changed in the memory: name -> (in words, changes of the recipe)."""
    width, segment = lm2.slot_dim or 0, lm2.segment_length
    span = lm2.attention_span or segment
    found = {
        "gates.sigmoid": ("gates never close (the paper's)", ("model.lm2.gate_stretch=0",)),
        "gates.stretched": ("gates close completely, stretch 0.1", ("model.lm2.gate_stretch=0.1",)),
        "gates.wide": ("gates close completely, stretch 0.3", ("model.lm2.gate_stretch=0.3",)),
        "gates.skip": ("one gate per slot to skip an update", ("model.lm2.skip_gate=true",)),
        "slots.half": (f"{lm2.num_slots // 2} slots", (f"model.lm2.num_slots={lm2.num_slots // 2}",)),
        "slots.double": (f"{2 * lm2.num_slots} slots", (f"model.lm2.num_slots={2 * lm2.num_slots}",)),
        "reads.few": (f"reads of {lm2.num_slots // 4} slots only", (f"model.lm2.read_top_k={lm2.num_slots // 4}",)),
        "segment.half": (f"segments of {segment // 2} tokens", (f"model.lm2.segment_length={segment // 2}",)),
        "segment.double": (
            f"segments and span of {2 * segment} tokens",
            (f"model.lm2.attention_span={max(span, 2 * segment)}", f"model.lm2.segment_length={2 * segment}"),
        ),
        "span.double": (f"span of {2 * span} tokens", (f"model.lm2.attention_span={2 * span}",)),
    }
    for kept in (0.9, 0.95, 0.99, 0.999):
        if kept != lm2.retention:
            found[f"retention.{kept:g}"] = (f"retention {kept:g} at the start", (f"model.lm2.retention={kept:g}",))
    if width:
        found["width.half"] = (f"slots of width {width // 2}", (f"model.lm2.slot_dim={width // 2}",))
        found["width.double"] = (f"slots of width {2 * width}", (f"model.lm2.slot_dim={2 * width}",))
    if lm2.gate_stretch in (0.0, 0.1):
        del found["gates.sigmoid" if lm2.gate_stretch == 0 else "gates.stretched"]
    return found


def _data_changes(data: BabilongData) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return what may be changed in the training samples."""
    longest = data.lengths[-1]
    return {
        "training.longer": (
            f"training up to {2 * longest:,} tokens",
            (f"data.lengths=[{', '.join(map(str, [*data.lengths, 2 * longest]))}]",),
        ),
        "training.all-tokens": ("loss on the text as well", ("data.loss_on=all",)),
        "training.facts": ("loss on the facts as well", ("data.loss_on=facts",)),
    }


def _all_marks(answers: Answers, label: str) -> Marks:
    """Return the marks at all lengths after each other, [S, N]."""
    return np.concatenate([answers.marks(label, length) for length in answers.lengths], axis=1)


def _compare(answers: Answers) -> list[Json]:
    if BASE not in answers.labels:
        return []
    ours = _all_marks(answers, BASE)
    found: list[Json] = [
        {"variant": label, **paired(_all_marks(answers, label), ours)} for label in answers.labels if label != BASE
    ]
    for test, corrected in zip(found, holm([test["p_value"] for test in found]), strict=True):
        test["corrected_p"] = corrected
    return found


def _change_grid(results: Json, lengths: Sequence[str]) -> Grid:
    rows = {row["label"]: row for row in results["rows"]}
    tests = {test["variant"]: test for test in results["comparisons"]}
    lines = []
    for variant in results["variants"]:
        row = rows[variant["name"]]
        means = [f"{100 * row['cells'][length]['mean']['mean']:.0f}" for length in lengths]
        low, mean, high = (f"{100 * row['all'][end]:.1f}" for end in ("low", "mean", "high"))
        test = tests.get(variant["name"])
        facts = (f"{row['parameters']:,}", state_text(variant))
        lines.append((variant["name"], variant["arm"], *facts, *means, f"{mean} [{low}–{high}]", *_test_texts(test)))
    head = ("variant", "change", "parameters", "state, bytes", *lengths, "all", "difference", "by seed", "p (Holm)")
    return Grid(head, tuple(lines))


def _test_texts(test: Json | None) -> tuple[str, str, str]:
    if test is None:
        return "–", "–", "–"
    low, mean, high = (f"{100 * test['difference'][end]:+.1f}" for end in ("low", "mean", "high"))
    p_value = p_text(test["corrected_p"])
    marked = f"**{p_value}**" if test["corrected_p"] < SIGNIFICANCE else p_value
    return f"{mean} [{low}, {high}]", " ".join(f"{100 * value:+.1f}" for value in test["by_seed"]), marked


def _sentences(tests: Sequence[Json]) -> list[str]:
    """Say which changes help, which harm and which cannot be told from the base."""
    groups: dict[str, list[str]] = {"Better than the base": [], "Worse": [], "Cannot be told from it": []}
    for test in tests:
        is_sure = test["corrected_p"] < SIGNIFICANCE
        better = test["difference"]["mean"] > 0
        group = "Cannot be told from it" if not is_sure else "Better than the base" if better else "Worse"
        groups[group].append(f"`{test['variant']}`")
    return [f"- {group}: {', '.join(names) or 'none'}." for group, names in groups.items()]
