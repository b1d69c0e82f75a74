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

from mnemon.errors import ConfigError
from mnemon.evaluation.checkpoints import load_spec
from mnemon.evaluation.paired import SIGNIFICANCE, mean_interval
from mnemon.evaluation.results import result_from_dict
from mnemon.evaluation.samples import parse_length
from mnemon.evaluation.suite import evaluate_models
from mnemon.evaluation.tables import Grid
from mnemon.studies.babilong_questions import suite_options
from mnemon.studies.babilong_tables import Answers, Marks, accuracy_grid, model_rows, paired, texts_of
from mnemon.studies.comparisons import add_corrected
from mnemon.studies.study import Json, PlannedRun, Scale, Study, Variant, state_text
from mnemon.training.data_sections import BabilongData
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import changed_recipe
from mnemon.training.trainer import wants_cuda

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

BASE = "base"
_Changes = dict[str, tuple[str, tuple[str, ...]]]
"""Name of a variant -> what it is in words, and the changes of the recipe."""

_TOLD = ("qa4", "qa5")
"""Tasks whose further questions about a context are answered by those before them."""

_NOTHING = ("–", "–", "–")


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
        """Return the base and every change that can be made to it and makes it another recipe."""
        found = {BASE: ("as it is", ()), **_memory_changes(base), **_block_changes(base), **_data_changes(base)}
        found |= _step_changes(base)
        return tuple(
            Variant(name, "", what, changes)
            for name, (what, changes) in found.items()
            if name == BASE or _is_another(base, changes)
        )

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
            "(crossed bootstrap). Holm-corrected over all lines; bold: below 0.05. One seed says nothing about others. "
            "*learned after*: tokens of training after which the longest texts had been learned.",
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

    def findings(self, results: Json) -> list[str]:
        """Say which changes help, which harm and which cannot be told from the base."""
        return [line.removeprefix("- ") for line in _sentences(results["comparisons"])]

    def summary(self, results: Json) -> list[str]:
        """Return the table of changes."""
        lengths = list(results["rows"][0]["cells"])
        return [_change_grid(results, lengths).markdown()]

    def figures(self, results: Json) -> list[Plot]:
        """Draw the differences to the base."""
        from mnemon.studies.figures import differences_to

        return [differences_to(BASE, results["comparisons"])] if results["comparisons"] else []


def _is_another(base: Recipe, changes: tuple[str, ...]) -> bool:
    """Say whether changes can be made to a recipe, and change it."""
    try:
        return changed_recipe(base, changes) != base
    except ConfigError:  # such as half of a single slot
        return False


def _memory_changes(base: Recipe) -> _Changes:
    """Return what may be changed in the memory; what is so already is left out later."""
    lm2 = base.model.lm2
    assert lm2 is not None
    assert lm2.slot_dim is not None
    slots, width, segment, span = lm2.num_slots, lm2.slot_dim, lm2.segment_length, lm2.attention_span
    found: _Changes = {
        "gates.sigmoid": ("gates never close (the paper's)", ("model.lm2.gate_stretch=0.0",)),
        "gates.stretched": ("gates close completely, stretch 0.1", ("model.lm2.gate_stretch=0.1",)),
        "gates.wide": ("gates close completely, stretch 0.3", ("model.lm2.gate_stretch=0.3",)),
        "gates.skip": ("one gate per slot to skip an update", ("model.lm2.skip_gate=true",)),
        "gates.no-skip": ("no gate to skip an update", ("model.lm2.skip_gate=false",)),
        "gates.skip-cost": (
            "a gate per slot to skip an update, and a loss on writing",
            ("model.lm2.skip_gate=true", "model.lm2.write_cost=0.1"),
        ),
        "gates.coupled": ("a slot takes in as much as it forgets", ("model.lm2.coupled_gates=true",)),
        "query.bank": ("slots ask by what they hold alone", ("model.lm2.write_query=bank",)),
        "query.key": ("slots ask by their fixed keys alone", ("model.lm2.write_query=key",)),
        "write.convolution": ("a convolution of 4 tokens over what is written", ("model.lm2.write_conv=4",)),
        "output.silent": ("a fresh memory adds nothing", ("model.lm2.initial_output=0.0",)),
        "output.soft": ("a fresh memory adds as much as an embedding", ("model.lm2.initial_output=null",)),
        "output.loud": ("a fresh memory adds much more than an embedding", ("model.lm2.initial_output=1.0",)),
        "slots.half": (f"{slots // 2} slots", (f"model.lm2.num_slots={slots // 2}",)),
        "slots.double": (f"{2 * slots} slots", (f"model.lm2.num_slots={2 * slots}",)),
        "width.half": (f"slots of width {width // 2}", (f"model.lm2.slot_dim={width // 2}",)),
        "width.double": (f"slots of width {2 * width}", (f"model.lm2.slot_dim={2 * width}",)),
        "reads.few": (f"reads of {slots // 4} slots only", (f"model.lm2.read_top_k={slots // 4}",)),
        "segment.half": (f"segments of {segment // 2} tokens", (f"model.lm2.segment_length={segment // 2}",)),
    }
    if span is not None:
        double = f"model.lm2.attention_span={2 * span}"
        found["span.double"] = (f"span of {2 * span} tokens", (double,))
        found["segment.double"] = (
            f"segments of {2 * segment}, span of {2 * span} tokens",
            (double, f"model.lm2.segment_length={2 * segment}"),
        )
    for kept in (0.9, 0.95, 0.99, 0.999):
        found[f"retention.{kept:g}"] = (f"retention {kept:g} at the start", (f"model.lm2.retention={kept:g}",))
    return found


def _block_changes(base: Recipe) -> _Changes:
    """Return what may be changed in where the memory stands.

    A decoder with one block that has a memory gets a second one, with attention in place of the convolution before it:
    with one, there is nothing for a bank to flow through.
    """
    assert base.model.lm2 is not None
    decoder = base.model.base or {}
    kinds = list(decoder.get("layer_types") or ["full_attention"] * int(decoder.get("num_hidden_layers", 1)))
    with_memory = base.model.lm2.memory_layers
    if with_memory is None:
        with_memory = [index for index, kind in enumerate(kinds) if kind != "conv"]
    if len(with_memory) > 1:
        return {
            "flow.layer": ("one bank per block", ("model.lm2.flow=layer",)),
            "blocks.first": (
                "memory in the first of its blocks alone",
                (f"model.lm2.memory_layers=[{with_memory[0]}]",),
            ),
            "blocks.last": (
                "memory in the last of its blocks alone",
                (f"model.lm2.memory_layers=[{with_memory[-1]}]",),
            ),
        }
    if with_memory and with_memory[0] > 0 and kinds[with_memory[0] - 1] == "conv":
        (last,) = with_memory
        kinds[last - 1] = "full_attention"
        attention = f"model.base.layer_types=[{', '.join(kinds)}]"
        both = f"model.lm2.memory_layers=[{last - 1}, {last}]"
        return {
            "blocks.two": (
                "attention and memory in one more block, one bank",
                (attention, both),
            ),
            "blocks.two-banks": (
                "attention and memory in one more block, a bank each",
                (attention, both, "model.lm2.flow=layer"),
            ),
            "blocks.two-attention": (
                "attention in one more block, memory in the last",
                (attention, f"model.lm2.memory_layers=[{last}]"),
            ),
        }
    return {}


def _data_changes(base: Recipe) -> _Changes:
    """Return what may be changed in the training samples."""
    assert isinstance(base.data, BabilongData)
    longer = [*base.data.lengths, 2 * base.data.lengths[-1]]
    all_facts = ("data.fact_limits=[]", "data.first_tasks=[]")
    found: _Changes = {
        "training.longer": (f"training up to {longer[-1]:,} tokens", (f"data.lengths={longer}",)),
        "training.jitter": ("training texts up to a quarter shorter", ("data.length_jitter=0.25",)),
        "training.exact": ("training texts of exact lengths", ("data.length_jitter=0",)),
        "training.once": ("one question per context", ("data.questions_per_story=1",)),
        "training.all-facts": ("no stages with few facts", all_facts),
        "training.at-once": (
            "the longest texts from the first token on",
            (*all_facts, f"data.lengths=[{base.data.lengths[-1]}]"),
        ),
        "training.names": ("every task with the names of all tasks", ("data.share_names=true",)),
        "training.all-tokens": ("loss on the text as well", ("data.loss_on=all",)),
        "training.facts": ("loss on the facts as well", ("data.loss_on=facts",)),
    }
    told = [task for task in _TOLD if task in base.data.tasks]
    if told:
        found["training.ask-once"] = (f"one question per context of {' and '.join(told)}", (f"data.ask_once={told}",))
    return found


def _step_changes(base: Recipe) -> _Changes:
    """Return how many tokens a step may take, with as many tokens in all."""
    tokens, rows = base.optimisation.batch_tokens, base.optimisation.min_rows
    sizes = {
        "steps.half": ("steps half as large, twice as many", tokens // 2, -(-rows // 2)),
        "steps.double": ("steps twice as large, half as many", 2 * tokens, 2 * rows),
    }
    return {
        name: (what, (f"optimisation.batch_tokens={size}", f"optimisation.min_rows={least}"))
        for name, (what, size, least) in sizes.items()
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
    add_corrected(found)
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
        facts = (f"{row['parameters']:,}", state_text(variant), _learned_text(variant))
        lines.append(
            (
                variant["name"],
                variant["arm"],
                *facts,
                *means,
                f"{mean} [{low}–{high}]",
                *(texts_of(test) if test else _NOTHING),
            )
        )
    facts_head = ("variant", "change", "parameters", "state, bytes", "learned after")
    return Grid((*facts_head, *lengths, "all", "difference", "by seed", "p (Holm)"), tuple(lines))


def _learned_text(variant: Json) -> str:
    """Return after how many tokens the longest training texts were learned, mean over the seeds that learned them."""
    after = variant["learned_after"]
    learned = [tokens for tokens in after if tokens is not None]
    if not learned:
        return "not"
    of = "" if len(learned) == len(after) else f" ({len(learned)} of {len(after)} seeds)"
    return f"{np.mean(learned) / 1e6:.2f}M{of}"


def _sentences(tests: Sequence[Json]) -> list[str]:
    """Say which changes help, which harm and which cannot be told from the base."""
    groups: dict[str, list[str]] = {"Better than the base": [], "Worse": [], "Cannot be told from it": []}
    for test in tests:
        is_sure = test["corrected_p"] < SIGNIFICANCE
        better = test["difference"]["mean"] > 0
        group = "Cannot be told from it" if not is_sure else "Better than the base" if better else "Worse"
        groups[group].append(f"`{test['variant']}`")
    return [f"- {group}: {', '.join(names) or 'none'}." for group, names in groups.items()]
