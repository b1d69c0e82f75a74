"""The study `mom-mqar`: does a mixture of memories recall more than one memory, or than one as large?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from mnemon.evaluation.checkpoints import load_network_spec
from mnemon.evaluation.paired import mean_interval
from mnemon.evaluation.tables import Grid, p_text
from mnemon.metrics.mqar import held_out_samples, queries_right, recall_row
from mnemon.ops import list_rules
from mnemon.studies import memory_arms
from mnemon.studies.comparisons import add_corrected, paired_difference
from mnemon.studies.execution import read_json
from mnemon.studies.memory_arms import ARMS, ATTENTION
from mnemon.studies.study import Claim, Json, PlannedRun, Scale, Study, Variant, points_text, state_text
from mnemon.training.data_sections import MqarData
from mnemon.training.recipe import MoMOptions, Recipe
from mnemon.training.run import SUMMARY_FILE
from mnemon.training.trainer import wants_cuda

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

_MEASURED = 2**20
"""Seed of the measured samples: above those of all runs, whose own validation has the run's seed."""

_ABLATED = ("gated_delta_net", "gla")
_SIGNIFICANT = 0.05
_MATTERS = 0.01
"""Share of right answers below which a gain is called none."""

_CEILING = 0.99
"""Share of right answers above which two arms cannot be told apart."""

_TINY = (
    "model.base.hidden_size=16",
    "model.base.intermediate_size=16",
    "model.mom.head_dim=8",
    "data.vocab_size=64",
    "data.slices=[{length: 16, num_pairs: 2}]",
    "evaluation.slices=[{length: 16, num_pairs: 2}, {length: 32, num_pairs: 4}]",
    "evaluation.samples=8",
    "optimisation.batch_tokens=256",
    "optimisation.max_tokens=2048",
    "optimisation.warmup_steps=2",
    "output.log_every_steps=2",
)


class MomMqar(Study):
    """Recall over the number of pairs, for every update rule as one memory, as a mixture, and as one larger memory."""

    name = "mom-mqar"
    title = "Mixtures of memories on associative recall"
    recipe = "mqar-study"
    scales: ClassVar[Mapping[str, Scale]] = {
        "tiny": Scale(_TINY, seeds=1, samples=8, rules=_ABLATED),
        "small": Scale((), seeds=3, samples=1000),
    }
    tunable = True

    def variants(self, base: Recipe, scale: Scale) -> tuple[Variant, ...]:
        """Return attention, three arms per rule, and the ablations."""
        options, rules = base.model.mom or MoMOptions(), scale.rules or list_rules()
        decoder = base.model.base
        found = [memory_arms.attention() if decoder is None else memory_arms.attention_after_convolution(decoder)]
        for rule in rules:
            found += [memory_arms.single(rule), memory_arms.mixture(rule), memory_arms.enlarged(rule, options)]
        for rule in _ABLATED:
            if rule in rules:
                found += memory_arms.ablations(rule, options)
        return tuple(found)

    def lengths(self, recipe: Recipe) -> list[int]:
        """Return the lengths of the measured slices."""
        return sorted({part.length for part in recipe.evaluation.slices})

    def tokens_read(self, run: PlannedRun) -> int:
        """Return the tokens of all slices, of the run's own validation and of the measurement."""
        evaluation = run.recipe.evaluation
        return sum((run.samples + evaluation.samples) * part.length for part in evaluation.slices)

    def measure(self, run: PlannedRun, folder: Path) -> Json:
        """Ask the same queries of every run; keep how many each sample's were answered, for paired comparisons."""
        data = run.recipe.data
        assert isinstance(data, MqarData)
        device = "cuda" if wants_cuda(run.recipe.optimisation) else "cpu"
        model = load_network_spec(run.name, str(folder), device=device).model
        cells = []
        for part in run.recipe.evaluation.slices:
            samples = held_out_samples(data.settings(part), run.samples, _MEASURED)
            right = queries_right(model, samples)
            cells.append({**recall_row(samples, right), "right_per_sample": right.sum(axis=1).tolist()})
        return {"cells": cells}

    def score(self, folder: Path) -> float:
        """Return the mean accuracy of the run's own validation, whose samples are not the measured ones."""
        table = read_json(folder / SUMMARY_FILE)["validation"]
        return float(np.mean([row["accuracy"]["mean"] for cells in table.values() for row in cells.values()]))

    def analyse(self, variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> Json:
        """Add a row per slice to every variant; compare the mixture of every rule with its other arms."""
        shares = {name: [_shares(cells) for cells in _by_slice(runs)] for name, runs in measures.items()}
        for variant in variants:
            cells = measures[variant["name"]][0]["cells"]
            variant["rows"] = [
                {"length": cell["length"], "num_pairs": cell["num_pairs"], **_accuracy(values)}
                for cell, values in zip(cells, shares[variant["name"]], strict=True)
            ]
            variant["mean"] = _accuracy(np.concatenate(shares[variant["name"]], axis=1))
        guessing = float(np.mean([1 / row["num_pairs"] for row in variants[0]["rows"]]))
        rules = dict.fromkeys(variant["rule"] for variant in variants)
        comparisons = [
            {"against": other, "guessing": guessing, **_difference(rule, shares[first], shares[second])}
            for other in ("single", "enlarged")
            for rule in rules
            if (first := f"{rule}.mom") in shares and (second := f"{rule}.{other}") in shares
        ]
        for other in ("single", "enlarged"):
            family = [comparison for comparison in comparisons if comparison["against"] == other]
            add_corrected(family)
            for comparison in family:
                comparison["verdict"] = verdict(comparison)
        ablations = [
            {"arm": variant["arm"], **_difference(rule, shares[variant["name"]], shares[mixture])}
            for variant in variants
            if variant["arm"] not in (*ARMS, ATTENTION) and (mixture := f"{(rule := variant['rule'])}.mom") in shares
        ]
        add_corrected(ablations)
        return {"comparisons": comparisons, "ablations": ablations}

    def body(self, results: Json) -> list[str]:
        """Return what was found: a sentence per rule, the comparisons, accuracies, ablations."""
        model = results["recipe"]["model"]
        mom, base = model["mom"], model["base"]
        shared = " and a shared one" if mom["shared_memory"] else ""
        trained = ", ".join(f"{part['num_pairs']} in {part['length']}" for part in results["recipe"]["data"]["slices"])
        lines = [
            f"A decoder of {base['num_hidden_layers']} blocks of width {base['hidden_size']} with memories in the "
            f"place of attention ({mom['num_heads']} heads of {mom['head_dim']}) learns associative recall (MQAR, "
            "arXiv:2312.04927); trained on pairs in "
            f"tokens: {trained}. *Single* is one memory, *mom* a mixture of {mom['num_memories']} memories of which a "
            f"token goes to {mom['top_k']}{shared}, *enlarged* one memory as large as all memories of the "
            "mixture together, *attention* a block with a short convolution before one with softmax attention.",
            "",
        ]
        if results["comparisons"]:
            lines += ["## Does the mixture help?", "", *sentences(results["comparisons"]), ""]
            lines += [_COMPARISON_NOTE, "", _comparison_grid(results["comparisons"]).markdown()]
        main = [variant for variant in results["variants"] if variant["arm"] in (*ARMS, ATTENTION)]
        others = [variant for variant in results["variants"] if variant["arm"] not in (*ARMS, ATTENTION)]
        note = (
            f"Queries answered rightly in percent, {results['samples']:,} samples per cell, the same for all variants; "
            "in brackets 95 % intervals over seeds and samples (crossed bootstrap; Wilson's where all are alike). "
            "State: bytes a sequence carries from token to token at the longest length, the convolution's included."
        )
        if main:
            lines += ["## Accuracy", "", note, "", _accuracy_grid(main).markdown()]
        if others:
            lines += ["## The mixture, changed in one respect", "", _accuracy_grid(others).markdown()]
        if results["ablations"]:
            lines += [_ABLATION_NOTE, "", _ablation_grid(results["ablations"]).markdown()]
        return lines

    def findings(self, results: Json) -> list[str]:
        """Say for which rules the mixture helps."""
        found = []
        for other in ("single", "enlarged"):
            own = [comparison for comparison in results["comparisons"] if comparison["against"] == other]
            parts = [
                f"{verdict} for {', '.join(names)}"
                for verdict in ("helps", "does not help", "cannot be told")
                if (names := [comparison["rule"] for comparison in own if comparison["verdict"] == verdict])
            ]
            if parts:
                found.append(f"On associative recall a mixture against {ARMS[other]}: {'; '.join(parts)}.")
        return found

    def claims(self, results: Json) -> list[Claim]:
        """Say for how many rules the mixture is shown to help, against one memory and against one as large."""
        return [
            Claim(paper, f"{_counts(own)}.")
            for against, paper in _CLAIMS.items()
            if (own := [entry["verdict"] for entry in results["comparisons"] if entry["against"] == against])
        ]

    def summary(self, results: Json) -> list[str]:
        """Return one line per rule: the accuracy of its arms, and what the mixture gains."""
        return [_rule_grid(results).markdown()]

    def figures(self, results: Json) -> list[Plot]:
        """Draw accuracy over pairs, one panel per rule, and accuracy over the size of the state."""
        from mnemon.studies.figures import accuracy_over_pairs, accuracy_over_state

        return [accuracy_over_pairs(results["variants"]), accuracy_over_state(results["variants"])]


def _counts(verdicts: Sequence[str]) -> str:
    helps, not_helps, open_ = (verdicts.count(name) for name in ("helps", "does not help", "cannot be told"))
    return f"Helps for {helps} of {len(verdicts)} rules, does not help for {not_helps}, cannot be told for {open_}"


def verdict(comparison: Json) -> str:
    """Say in a word or two what a comparison tells.

    Args:
        comparison: of a mixture with another arm.

    Returns:
        "helps": better by the corrected p value and in every one of several seeds; "does not help": the interval ends
        below one point; else "cannot be told", as for arms that have both learned nothing or all there is.
    """
    several = len(comparison["by_seed"]) > 1
    mixture, other = comparison["accuracies"]
    if max(mixture, other) <= comparison["guessing"] or min(mixture, other) > _CEILING:
        return "cannot be told"
    if several and comparison["corrected_p"] < _SIGNIFICANT and min(comparison["by_seed"]) > 0:
        return "helps"
    return "does not help" if several and comparison["difference"]["high"] < _MATTERS else "cannot be told"


def sentences(comparisons: Sequence[Json]) -> Iterator[str]:
    """Go through one sentence per comparison, as lines of a list."""
    for comparison in comparisons:
        gain, seeds = 100 * comparison["difference"]["mean"], comparison["by_seed"]
        against = ARMS[comparison["against"]]
        finding = comparison["verdict"]
        what = f"a mixture {finding} against {against}"
        if finding == "cannot be told":
            what = f"whether a mixture helps against {against} cannot be told"
        yield f"- {comparison['rule']}: {what} ({gain:+.1f} points, {len(seeds)} seed(s))."


_CLAIMS = {
    "single": "A mixture recalls more than one memory of the same rule (MoM, recall of six data sets)",
    "enlarged": "And more than one memory enlarged to its size: 28.2 against 26.3 (Gated DeltaNet), 23.5 against 22.9 "
    "(GLA) on average (MoM, Table 5)",
}
_COMPARISON_NOTE = (
    "Differences in percentage points of the mean over all slices, on the same samples and seeds, with 95 % intervals "
    "over seeds and samples (crossed bootstrap); p from the same draws, Holm-corrected over the rules. *Helps*: "
    f"corrected p below {_SIGNIFICANT} and better in every one of several seeds. *Does not help*: the interval ends "
    f"below {100 * _MATTERS:.0f} point. Neither where both arms are no better than guessing one of the values shown, "
    f"or both above {100 * _CEILING:.0f} %. Intervals are stretched where there are few seeds."
)

_ABLATION_NOTE = (
    "The changed mixture minus the mixture, as above: percentage points of the mean over all slices, on the same "
    "samples and seeds, p Holm-corrected over these lines; bold: below 0.05."
)


def _by_slice(runs: Sequence[Json]) -> Iterator[list[Json]]:
    """Go through the slices; of each the cells of all seeds."""
    for cells in zip(*(run["cells"] for run in runs), strict=True):
        yield list(cells)


def _shares(cells: Sequence[Json]) -> NDArray[np.float64]:
    """Return the share of right answers per seed and sample, [S, N]."""
    return np.array([cell["right_per_sample"] for cell in cells]) / cells[0]["num_pairs"]


def _accuracy(shares: NDArray[np.float64]) -> Json:
    return {"accuracy": asdict(mean_interval(shares)), "by_seed": shares.mean(axis=1).tolist()}


def _difference(rule: str, first: Sequence[NDArray[np.float64]], second: Sequence[NDArray[np.float64]]) -> Json:
    """Compare the shares of two variants, one array [S, N] per slice."""
    ours, theirs = np.concatenate(first, axis=1), np.concatenate(second, axis=1)
    accuracies = [float(ours.mean()), float(theirs.mean())]
    return {"rule": rule, "accuracies": accuracies, **paired_difference(ours, theirs, bounds=(-1.0, 1.0))}


def _comparison_grid(comparisons: Sequence[Json]) -> Grid:
    lines = [
        (entry["rule"], f"mom − {entry['against']}", *_difference_cells(entry), entry["verdict"])
        for entry in comparisons
    ]
    return Grid(("rule", "arms", *_DIFFERENCE_HEAD, "the mixture"), tuple(lines))


def _ablation_grid(ablations: Sequence[Json]) -> Grid:
    lines = [(entry["rule"], f"{entry['arm']} − mom", *_difference_cells(entry)) for entry in ablations]
    return Grid(("rule", "arms", *_DIFFERENCE_HEAD), tuple(lines))


_DIFFERENCE_HEAD = ("difference", "by seed", "p (Holm)")


def _difference_cells(entry: Json) -> tuple[str, str, str]:
    seeds = " ".join(f"{100 * value:+.1f}" for value in entry["by_seed"])
    return points_text(entry), seeds, p_text(entry["corrected_p"])


def _rule_grid(results: Json) -> Grid:
    by_name = {variant["name"]: variant for variant in results["variants"]}
    gains = {(entry["rule"], entry["against"]): entry for entry in results["comparisons"]}
    lines = []
    for rule in dict.fromkeys(variant["rule"] for variant in results["variants"] if variant["arm"] in ARMS):
        means = (
            f"{100 * by_name[name]['mean']['accuracy']['mean']:.1f}" if (name := f"{rule}.{arm}") in by_name else "–"
            for arm in ARMS
        )
        differences = (
            _gain(gains[rule, other]) if (rule, other) in gains else ("–", "–") for other in ("single", "enlarged")
        )
        lines.append((rule, *means, *(text for pair in differences for text in pair)))
    head = ("rule", *ARMS, "mom − single", "the mixture", "mom − enlarged", "the mixture")
    return Grid(head, tuple(lines), num_names=1)


def _gain(comparison: Json) -> tuple[str, str]:
    return points_text(comparison), comparison["verdict"]


def _accuracy_grid(variants: Sequence[Json]) -> Grid:
    rows = variants[0]["rows"]
    slices = [f"{row['num_pairs']} pairs in {row['length']}" for row in rows]
    head = ("rule", "arm", "parameters", "active", "state, bytes", "learning rate", "tokens", "seeds", *slices, "mean")
    lines = []
    for variant in variants:
        cells = [_percent(row["accuracy"]) for row in (*variant["rows"], variant["mean"])]
        facts = (
            f"{variant['parameters']['total']:,}",
            f"{variant['parameters']['active']:,}",
            state_text(variant),
            f"{variant['learning_rate']:g}",
            f"{variant['tokens'][0]:,}",
            f"{len(variant['tokens'])}",
        )
        lines.append((variant["rule"], variant["arm"], *facts, *cells))
    return Grid(head, tuple(lines))


def _percent(interval: Mapping[str, float]) -> str:
    low, mean, high = (f"{100 * interval[end]:.1f}" for end in ("low", "mean", "high"))
    return f"{mean} [{low}–{high}]"
