"""The study `mom-text`: language modelling with one memory per layer, with a mixture, and with attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from mnemon.evaluation.tables import Grid
from mnemon.ops import list_rules
from mnemon.studies import memory_arms
from mnemon.studies.study import Json, Scale, Variant
from mnemon.studies.text_study import TextStudy, add_text_rows, differences, perplexity_grid, published_lines
from mnemon.training.recipe import Recipe

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

_PUBLISHED_NOTE = (
    "Wikitext and the first Lambada column are perplexities, the rest accuracy in percent; other text and models."
)

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


_PUBLISHED = ("retnet", "hgrn2", "gla", "gsa", "gated_delta_net")
_LARGER = (
    "model.base.hidden_size=2048",
    "model.base.intermediate_size=5632",
    "model.base.num_attention_heads=32",
    "model.base.num_key_value_heads=32",
    "optimisation.max_tokens=100000000000",
)


class MomText(TextStudy):
    """Loss while training, and perplexity over context length, for every update rule single and as a mixture."""

    name = "mom-text"
    title = "Mixtures of memories on plain text"
    recipe = "text-study"
    scales: ClassVar[Mapping[str, Scale]] = {
        "tiny": Scale(_TINY, seeds=1, samples=0, rules=("gated_delta_net", "gla")),
        "small": Scale((), seeds=3, samples=0),
        "paper": Scale((), seeds=1, samples=0, recipe="mom-340m", rules=_PUBLISHED, launched=True),
        "paper-1.3b": Scale(_LARGER, seeds=1, samples=0, recipe="mom-340m", rules=_PUBLISHED, launched=True),
    }

    def variants(self, base: Recipe, scale: Scale) -> tuple[Variant, ...]:
        """Return attention, and two arms per rule."""
        rules = scale.rules or list_rules()
        arms = [arm(rule) for rule in rules for arm in (memory_arms.single, memory_arms.mixture)]
        return (memory_arms.attention(), *arms)

    def analyse(self, variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> Json:
        """Add a row per length and the loss curve to every variant; compare mixture and single memory seed by seed."""
        add_text_rows(variants, measures)
        by_name = {variant["name"]: variant for variant in variants}
        return {
            "comparisons": [
                {"rule": rule, "by_length": differences(by_name[f"{rule}.mom"], by_name[f"{rule}.single"])}
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
            perplexity_grid(results["variants"], ("rule", "arm"), lambda v: (v["rule"], v["arm"])).markdown(),
        ]
        if results["comparisons"]:
            note = "Bits per byte of the mixture minus the single memory, seed by seed; below 0 the mixture is better."
            lines += ["## Mixture against single memory", "", note, "", _comparison_grid(results).markdown()]
        if results["scale"].startswith("paper"):
            lines += published_lines("commonsense", "Language modelling and commonsense", _PUBLISHED_NOTE)
            lines += published_lines("recall", "Recall", "Input cut to 2K tokens; accuracy in percent.")
        return lines

    def findings(self, results: Json) -> list[str]:
        """Say for which rules the mixture models text better in every seed, at the trained length and the longest."""
        found = []
        for place in (0, -1):
            better = [entry["rule"] for entry in results["comparisons"] if _is_better(entry["by_length"][place], -1)]
            worse = [entry["rule"] for entry in results["comparisons"] if _is_better(entry["by_length"][place], 1)]
            if better or worse:
                entry = results["comparisons"][0]["by_length"][place]
                found.append(
                    f"At {entry['length']:,} tokens of plain text a mixture has fewer bits per byte than one memory in "
                    f"every seed ({len(entry['by_seed'])}) for {', '.join(better) or 'no rule'}, more for "
                    f"{', '.join(worse) or 'none'}."
                )
        return found

    def summary(self, results: Json) -> list[str]:
        """Return perplexities, and mixtures beside single memories."""
        grid = perplexity_grid(results["variants"], ("rule", "arm"), lambda v: (v["rule"], v["arm"]))
        return [grid.markdown(), *([_comparison_grid(results).markdown()] if results["comparisons"] else [])]

    def figures(self, results: Json) -> list[Plot]:
        """Draw the loss curves, one panel per rule."""
        from mnemon.studies.figures import loss_curves

        return [loss_curves(results["variants"])]


def _is_better(entry: Json, sign: int) -> bool:
    return all(sign * value > 0 for value in entry["by_seed"])


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
