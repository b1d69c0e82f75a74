"""The study `lm2-figure5`: in how many blocks does a decoder need a memory?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

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
    sign_of,
)
from mnemon.training.recipe import Recipe

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

_SHARES = (0.375, 0.75, 1.0)
"""Of the blocks, from the first on; the paper compares 1, 6, 12 and 16 of 16."""

_TEXT = "data={kind: text, background: stdlib, length: 2048}"
_PREFIX = "blocks-"
_NONE = f"{_PREFIX}0"
_VERDICTS = {-1: "helps", 1: "harms", 0: "cannot be told from none"}
_CLAIM = (
    "Memory in the first block ends at the perplexity of no memory, in 6 of 16 blocks below it, in all of them lowest "
    "(LM2, Figure 5; its released code lets a token see later ones)"
)


class Lm2Figure5(TextStudy):
    """Loss over the tokens read and perplexity, by the number of blocks with memory."""

    name = "lm2-figure5"
    title = "Perplexity by the number of blocks with memory"
    recipe = "lm2-text-study"
    scales: ClassVar[Mapping[str, Scale]] = {
        "tiny": Scale(("optimisation.max_tokens=1000000",), seeds=1, samples=0),
        "small": Scale((), seeds=3, samples=0),
        "paper": Scale((_TEXT, "evaluation.samples=2"), seeds=1, samples=0, recipe="lm2-1.7b", launched=True),
    }

    def variants(self, base: Recipe, scale: Scale) -> tuple[Variant, ...]:
        """Return the decoder without memory, and with memory in its first block, 3/8, 3/4 and all of its blocks."""
        assert base.model.base is not None
        blocks = int(base.model.base["num_hidden_layers"])
        counts = sorted({1, *(max(1, round(share * blocks)) for share in _SHARES)})
        plain = Variant(_NONE, "", f"0 of {blocks}", ("model.kind=plain", "model.lm2=null"))
        return (plain, *(_with_memory(count, blocks) for count in counts))

    def analyse(self, variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> Json:
        """Add a row per length and the loss curve to every variant; compare each with the decoder without memory."""
        add_text_rows(variants, measures)
        for variant in variants:
            variant["blocks"] = int(variant["name"].removeprefix(_PREFIX))
        if _NONE not in measures:
            return {"comparisons": []}
        pairs = [
            Pair(variant["name"], _NONE, {"blocks": variant["arm"], "against": "none"})
            for variant in variants
            if variant["name"] != _NONE
        ]
        return {"comparisons": compare(variants, measures, pairs)}

    def body(self, results: Json) -> list[str]:
        """Return the table of perplexities, and the differences to no memory."""
        recipe = results["recipe"]
        base, lm2 = recipe["model"]["base"], recipe["model"]["lm2"]
        lines = [
            f"A Llama of {base['num_hidden_layers']} blocks of width {base['hidden_size']} reads "
            f"`{recipe['data']['background']}` in blocks of {recipe['data']['length']:,} tokens, with LM2's memory "
            f"({lm2['num_slots']} slots, updated every {lm2['segment_length']} tokens) in the first so many of its "
            "blocks, as in Figure 5 of the LM2 paper (arXiv:2502.06049), whose values are only in its plot. Memory "
            "adds parameters: the table says how many. Attention sees all of a block of text, memory comes on top.",
            "",
            "## Perplexity of held-out text",
            "",
            PERPLEXITY_NOTE,
            "",
            perplexity_grid(results["variants"], ("model", "blocks with memory"), _names).markdown(),
        ]
        if results["comparisons"]:
            grid = comparison_grid(
                results["comparisons"], ("blocks with memory", "against"), lambda e: (e["blocks"], e["against"])
            )
            lines += ["## Memory against none", "", COMPARISON_NOTE, "", grid.markdown()]
        return lines

    def findings(self, results: Json) -> list[str]:
        """Say what memory in so many blocks changes at the trained length."""
        found = []
        for comparison in results["comparisons"]:
            test = comparison["by_length"][0]
            verdict = _VERDICTS[sign_of(test)]
            low, mean, high = (f"{test['difference'][end]:+.3f}" for end in ("low", "mean", "high"))
            found.append(
                f"Memory in {comparison['blocks']} blocks {verdict} in plain text: {mean} bits per byte "
                f"[{low}, {high}], {len(test['by_seed'])} seed(s)."
            )
        return found

    def claims(self, results: Json) -> list[Claim]:
        """Say whether perplexity falls with the number of blocks with memory."""
        if not results["comparisons"]:
            return []
        said = [f"{entry['blocks']}: {_VERDICTS[sign_of(entry['by_length'][0])]}" for entry in results["comparisons"]]
        tests = [entry["by_length"][0] for entry in results["comparisons"]]
        means = [test["difference"]["mean"] for test in tests]
        whole = sign_of(tests[-1])
        here = "Holds" if whole < 0 and means[-1] == min(means) else "Does not hold" if whole > 0 else "Not shown"
        return [Claim(_CLAIM, f"{here}; memory in so many blocks against none: {', '.join(said)}.")]

    def summary(self, results: Json) -> list[str]:
        """Return perplexities by number of blocks."""
        return [perplexity_grid(results["variants"], ("model", "blocks with memory"), _names).markdown()]

    def figures(self, results: Json) -> list[Plot]:
        """Draw the loss curves, a line per number of blocks, and perplexity over that number."""
        from mnemon.studies.figures import loss_lines, perplexity_over_blocks

        variants = results["variants"]
        return [loss_lines(variants, "blocks with memory"), perplexity_over_blocks(variants)]


def _with_memory(count: int, blocks: int) -> Variant:
    return Variant(f"{_PREFIX}{count}", "", f"{count} of {blocks}", (f"model.lm2.memory_layers={list(range(count))}",))


def _names(variant: Json) -> tuple[str, str]:
    return "plain" if variant["name"] == _NONE else "LM2", variant["arm"]
