"""The study `mom-text`: language modelling with one memory per layer, with a mixture, and with attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from mnemon.evaluation.tables import Grid
from mnemon.ops import list_rules
from mnemon.studies import memory_arms
from mnemon.studies.memory_arms import ATTENTION
from mnemon.studies.study import Claim, Json, Scale, Variant
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

_CLAIM = (
    "A mixture of Gated DeltaNet models text better than any single memory: perplexity 26.0 against 26.5 and more of "
    "the others with 340M parameters (MoM, language modelling)"
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
        """Add a row per length and the loss curve to every variant; compare mixture, single memory and attention."""
        add_text_rows(variants, measures)
        pairs = [
            Pair(first, second, {"rule": rule, "arm": arm, "against": against})
            for arm, against in (("mom", "single"), ("single", ATTENTION), ("mom", ATTENTION))
            for rule in dict.fromkeys(variant["rule"] for variant in variants)
            if {first := f"{rule}.{arm}", second := ATTENTION if against == ATTENTION else f"{rule}.{against}"}
            <= set(measures)
        ]
        return {"comparisons": compare(variants, measures, pairs)}

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
            PERPLEXITY_NOTE,
            "",
            perplexity_grid(results["variants"], ("rule", "arm"), lambda v: (v["rule"], v["arm"])).markdown(),
        ]
        for title, against in (("Mixture against single memory", "single"), ("Memories against attention", ATTENTION)):
            entries = [entry for entry in results["comparisons"] if entry["against"] == against]
            if entries:
                lines += [f"## {title}", "", COMPARISON_NOTE, "", _comparison_grid(entries).markdown()]
        if results["scale"].startswith("paper"):
            lines += published_lines("commonsense", "Language modelling and commonsense", _PUBLISHED_NOTE)
            lines += published_lines("recall", "Recall", "Input cut to 2K tokens; accuracy in percent.")
        return lines

    def findings(self, results: Json) -> list[str]:
        """Say for which rules the mixture models text better in every seed, at the trained length and the longest."""
        found = []
        entries = [entry for entry in results["comparisons"] if entry["against"] == "single"]
        for place in (0, -1) if entries else ():
            first = entries[0]["by_length"][place]
            signs = {entry["rule"]: sign_of(entry["by_length"][place]) for entry in entries}
            parts = [
                f"{what} for {', '.join(names)}"
                for sign, what in ((-1, "fewer bits per byte"), (1, "more"), (0, "cannot be told"))
                if (names := [rule for rule, value in signs.items() if value == sign])
            ]
            found.append(
                f"At {first['length']:,} tokens of plain text a mixture against one memory: {'; '.join(parts)} "
                f"({len(first['by_seed'])} seed(s))."
            )
        return found

    def claims(self, results: Json) -> list[Claim]:
        """Say for how many rules the mixture models text better than one memory, at the trained length."""
        own = [entry for entry in results["comparisons"] if entry["against"] == "single"]
        if not own:
            return []
        signs = [sign_of(entry["by_length"][0]) for entry in own]
        here = f"Better for {signs.count(-1)} of {len(signs)} rules, worse for {signs.count(1)}"
        return [Claim(_CLAIM, f"{here}; the mixtures have more parameters.")]

    def summary(self, results: Json) -> list[str]:
        """Return perplexities, and mixtures beside single memories."""
        grid = perplexity_grid(results["variants"], ("rule", "arm"), lambda v: (v["rule"], v["arm"]))
        entries = [entry for entry in results["comparisons"] if entry["against"] == "single"]
        return [grid.markdown(), *([_comparison_grid(entries).markdown()] if entries else [])]

    def figures(self, results: Json) -> list[Plot]:
        """Draw the loss curves, one panel per rule."""
        from mnemon.studies.figures import loss_curves

        return [loss_curves(results["variants"])]


def _comparison_grid(comparisons: Sequence[Json]) -> Grid:
    return comparison_grid(
        comparisons, ("rule", "arms"), lambda entry: (entry["rule"], f"{entry['arm']} − {entry['against']}")
    )
