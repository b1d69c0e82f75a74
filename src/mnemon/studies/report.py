"""One report over the studies that were run: what was found, the tables that say so, and how to run them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mnemon.evaluation.tables import Grid
from mnemon.studies.registry import get_study, list_studies
from mnemon.studies.study import Json, steps_text

_QUESTION = (
    "Two papers claim that an explicit memory makes language models better: a bank of gated slots beside attention "
    "(LM2, arXiv:2502.06049) and several linear memories with a router (MoM, arXiv:2502.13685). This page asks both "
    "claims of models whose memories are causal, at sizes that a laptop can train: every arm reads data of "
    "the same kind, answers the same questions, and differs from the others in what is said. Written by "
    "`scripts/update_study_report.py` from the results of the studies; no number is typed by hand."
)
_METHOD = (
    "All arms of a study share decoder, data, number of tokens, schedule and, unless its section or page says "
    "otherwise, learning rate and size of steps, and the batches come in the same order; only BABILong's texts grow "
    "for each model when it has learned those before, or after a fixed number of tokens. Where arms are compared at "
    "equal size, parameters differ by at most 2 %. Training and held-out samples share no story and no document. "
    "Every arm answers the same held-out questions, or reads the same windows of text, so that two arms are compared "
    "one by one: with one training seed by a paired bootstrap (right and wrong answers by McNemar's exact test), with"
    " several by a bootstrap crossed over seeds and questions; p values are Holm-corrected over the lines of a table."
    " Intervals cover 95 %. Models are causal, which the released code of LM2 is not: tests change later tokens and "
    "expect earlier logits to stay as they are."
)
_LIMITS = (
    "The models are small, learn from scratch, and answer questions about generated stories or patterns; the published "
    "models are thousands of times larger and were trained, asked and scored differently. So the order of the arms and "
    "the course over length can be compared with the papers, the numbers cannot. Seeds are few: intervals over seeds "
    "are stretched for that, and one seed says nothing about others. The learning rate is the same for all arms of a "
    "study unless its page says that it was chosen per arm. Where arms take steps of another size, it was chosen on a "
    "part of the task with the seeds that are shown; why, and what the other arms do with such steps, is in "
    "[experiments](../experiments.md). RMT and ARMT are as published, LM2 has gates that close completely and a skip "
    "gate; what such gates do for ARMT is in the same place."
)

_CLAIMS_HEAD = ("the papers", "here", "seeds")


def report(results: Mapping[str, Json], pages: Mapping[str, str]) -> list[str]:
    """Return the lines of the report.

    Args:
        results: study -> content of its `results.json`; studies that were not run are named as open.
        pages: study -> link to its own page.
    """
    known = [name for name in list_studies() if name in results]
    lines = ["# Does an explicit memory win, where, and by how much?", "", _QUESTION, "", "## In short", ""]
    for name in known:
        found = [f"  - {sentence}" for sentence in get_study(name).findings(results[name])]
        lines += [f"- **{get_study(name).title}** ({results[name]['seeds']} training seed(s))", *found]
    missing = [f"`{name}`" for name in list_studies() if name not in results]
    if missing:
        lines += [f"- Not run yet: {', '.join(missing)}."]
    claims = [
        (claim.paper, f"[{claim.here}]({pages[name]})", str(results[name]["seeds"]))
        for name in known
        for claim in get_study(name).claims(results[name])
    ]
    if claims:
        grid = Grid(_CLAIMS_HEAD, tuple(claims), num_names=2)
        lines += ["", "## What the papers say, and what came out", "", grid.markdown().rstrip()]
    lines += ["", "## How it was asked", "", _METHOD]
    for name in known:
        lines += ["", *_section(name, results[name], pages[name])]
    return [*lines, "", "## Limits", "", _LIMITS, "", *_commands(results, known), ""]


def _section(name: str, results: Json, page: str) -> Iterator[str]:
    """Go through the lines of one study: tables, figures and where the rest is."""
    study = get_study(name)
    seeds = results["seeds"]
    tokens = max(max(variant["tokens"]) for variant in results["variants"])
    sizes = [variant["parameters"]["total"] for variant in results["variants"]]
    yield f"## {study.title}"
    yield ""
    yield (
        f"Scale `{results['scale']}`: {len(sizes)} variants of {min(sizes):,} to {max(sizes):,} parameters, {seeds} "
        f"training seed(s), {tokens:,} tokens each in steps of {steps_text(results)}. All of it: [{name}]({page})."
    )
    yield ""
    yield from study.summary(results)
    for figure in study.figures(results):
        yield f"![{figure.title}]({name}-{figure.name}.svg)"
        yield ""


def _commands(results: Mapping[str, Json], known: list[str]) -> Iterator[str]:
    yield "## To run it again"
    yield ""
    yield "```bash"
    yield from (results[name]["command"] for name in known)
    yield "```"
