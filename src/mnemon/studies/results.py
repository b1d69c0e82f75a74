"""From finished runs to `results.json`, and from that file to the page and its figures: no number is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnemon.errors import ConfigError, DataError
from mnemon.files import atomic_write_bytes, atomic_write_json, atomic_write_text, prepare_output_folder
from mnemon.studies.equal_size import refuse_unequal
from mnemon.studies.execution import (
    MACHINE,
    MEASURES,
    alone_in,
    execute,
    machine_of,
    read_json,
    refuse_other,
    refuse_untrained,
)
from mnemon.studies.order import Order
from mnemon.studies.planning import base_recipe, choose_variants, counted_facts, model_facts, plan_runs
from mnemon.studies.registry import get_study
from mnemon.studies.study import Json, PlannedRun, Scale, Study, Variant, steps_text
from mnemon.training.curriculum import LEARNED
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import check_recipe
from mnemon.training.run import SUMMARY_FILE

FORMAT = "mnemon-study-1"
PLAN, RESULTS, PAGE = "study.json", "results.json", "page.md"


def reproduce(
    order: Order,
    root: Path,
    *,
    tune: Sequence[float] = (),
    jobs: int = 1,
    overwrite: bool = False,
    command: str = "",
    report: Callable[[str], None] = lambda _: None,
) -> Json:
    """Run a study, or what is left of it, and write its results.

    Args:
        order: what is wanted.
        root: folder; finished runs in it are kept, interrupted ones go on.
        tune: learning rates to choose every variant's from, by seed 0; none = the recipe's for all.
        jobs: runs at the same time.
        overwrite: empty the folder first.
        command: how it was asked for, for the record.
        report: told what is done.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: a name, a pattern, a change or the folder is refused.
        RunError: a run failed.
        KeyboardInterrupt: interrupted; the next call goes on.
    """
    study, scale = order.resolve()
    if tune and (scale.launched or not study.tunable):
        raise ConfigError(f"{study.name} compares recipes as they are; leave out --tune")
    changes: Sequence[str] = order.changes
    base = base_recipe(study, scale, changes)
    variants = choose_variants(study, scale, base, order.only)
    # Whatever is wrong with a variant is told before anything starts.
    first = plan_runs(study, scale, variants, 1, changes)
    if study.equal_parameters:
        refuse_unequal(first)
    if scale.launched:
        _refuse_to_launch(plan_runs(study, scale, variants, scale.seeds, changes), root, overwrite)
    begun_with = {"study": order.study, "scale": order.scale, "recipe": base.model_dump(mode="json")}
    with _prepared(root, begun_with, overwrite, launched=scale.launched):
        if not scale.launched:
            changes = [*changes, *study.prepare(base, root)]
        scores = _tune(study, scale, variants, tune, changes, root, jobs, report)
        rates = {variant: max(found, key=lambda rate: found[rate]) for variant, found in scores.items()}
        runs = plan_runs(study, scale, variants, scale.seeds, changes, rates if tune else None)
        execute(study, runs, root, jobs, report)
        base = base_recipe(study, scale, changes)
        facts: Json = {
            "format": FORMAT,
            "study": order.study,
            "scale": order.scale,
            "seeds": scale.seeds,
            "samples": scale.samples,
            "command": command,
            "machine": machine_of(base),
            "recipe": _portable(base),
        }
        by_variant = _by_variant(runs)
        measures = {name: [read_json(run.folder(root) / MEASURES) for run in own] for name, own in by_variant.items()}
        collected = [_variant_facts(study, scale, own, root, scores) for own in by_variant.values()]
        results = facts | {"machines": _machines(measures), "variants": collected} | study.analyse(collected, measures)
        for folder in study.write(root, measures, results):
            report(f"wrote {folder}")
        write_page(root / PAGE, results, "")
        atomic_write_json(root / RESULTS, results)
    return results


def _machines(measures: Mapping[str, Sequence[Json]]) -> list[Json]:
    """Return the machines on which the runs were trained, with the number of runs of each."""
    found: list[Json] = []
    for run in (run for runs in measures.values() for run in runs if MACHINE in run):
        same = next((entry for entry in found if entry["machine"] == run[MACHINE]), None)
        if same is None:
            found.append({"machine": run[MACHINE], "runs": 1})
        else:
            same["runs"] += 1
    return found


def _refuse_to_launch(runs: Sequence[PlannedRun], root: Path, overwrite: bool) -> None:
    """Refuse what would train, or delete, runs that take many GPUs."""
    if overwrite:
        raise ConfigError(f"{root}: --overwrite would delete runs that were launched; delete them yourself if wanted")
    refuse_untrained(runs, root)


def _with_defaults(begun_with: Json) -> Json:
    """Complete a recipe by the keys that have come since it was written: what they do now by default was done then.

    Who changes a default has to write the former one into recipes that are kept (`docs/results/runs`, `checkpoints`).
    """
    try:
        recipe = check_recipe(begun_with["recipe"])
    except (ConfigError, KeyError):  # of something else: the comparison says what
        return begun_with
    return {**begun_with, "recipe": recipe.model_dump(mode="json")}


@contextmanager
def _prepared(root: Path, begun_with: Json, overwrite: bool, launched: bool) -> Iterator[None]:
    """Make the folder of a study, or make sure that the study in it is this one, and keep it from others meanwhile.

    A folder with launched runs is taken as it is: they are of the right recipes, which has been checked.
    """
    begun = (root / PLAN).is_file() and not overwrite
    if begun:
        earlier = _with_defaults(read_json(root / PLAN))
        for keys in (("study",), ("scale",), tuple(begun_with)):  # which study it is tells more than any of its keys
            refuse_other(root, {key: earlier.get(key) for key in keys}, {key: begun_with[key] for key in keys})
    with alone_in(root):
        prepare_output_folder(root, overwrite, resume=begun or launched, resumable=False)
        atomic_write_json(root / PLAN, begun_with)
        yield


def _by_variant(runs: Sequence[PlannedRun]) -> dict[str, list[PlannedRun]]:
    found: dict[str, list[PlannedRun]] = {}
    for run in runs:
        found.setdefault(run.variant.name, []).append(run)
    return found


def _variant_facts(
    study: Study,
    scale: Scale,
    runs: Sequence[PlannedRun],
    root: Path,
    scores: Mapping[str, Mapping[float, float]],
) -> Json:
    variant: Variant = runs[0].variant
    summaries = [read_json(run.folder(root) / SUMMARY_FILE) for run in runs]
    found = scores.get(variant.name, {})
    recipe = runs[0].recipe
    facts = counted_facts(recipe) if scale.launched else model_facts(recipe, study.lengths(recipe))
    return {
        "name": variant.name,
        "rule": variant.rule,
        "arm": variant.arm,
        "changes": list(variant.changes),
        "learning_rate": recipe.optimisation.learning_rate,
        "step_tokens": recipe.optimisation.batch_tokens,
        "tuning": {f"{rate:g}": score for rate, score in found.items()},
        **facts,
        "tokens": [summary["tokens"] for summary in summaries],
        "minutes": [summary["minutes"] for summary in summaries],
        "learned_after": [_learned_after(summary, recipe) for summary in summaries],
    }


def _learned_after(summary: Json, recipe: Recipe) -> int | None:
    """Return the tokens after which the last stage of the curriculum was learned, None where it was not."""
    stages = summary.get("stages", [])
    if len(stages) < len(recipe.data.stages) or stages[-1]["reason"] != LEARNED:
        return None
    return sum(stage["tokens"] for stage in stages)


def _tune(
    study: Study,
    scale: Scale,
    variants: Sequence[Variant],
    learning_rates: Sequence[float],
    changes: Sequence[str],
    root: Path,
    jobs: int,
    report: Callable[[str], None],
) -> dict[str, dict[float, float]]:
    """Train every variant with every learning rate on seed 0; return their scores."""
    if not learning_rates:
        return {}
    by_rate = {
        rate: plan_runs(study, scale, variants, 1, changes, dict.fromkeys((v.name for v in variants), rate))
        for rate in learning_rates
    }
    execute(study, [run for runs in by_rate.values() for run in runs], root, jobs, report)
    scores: dict[str, dict[float, float]] = {}
    for rate, runs in by_rate.items():
        for run in runs:
            scores.setdefault(run.variant.name, {})[rate] = study.score(run.folder(root))
    return scores


def read_results(folder: Path) -> Json:
    """Read the results of a study back.

    Raises:
        DataError: there are none, or they are not a study's.
    """
    results = read_json(folder / RESULTS)
    if results.get("format") != FORMAT:
        raise DataError(f"{folder / RESULTS}: expected format {FORMAT}, got {results.get('format')!r}; run it again")
    return results


def write_page(path: Path, results: Json, prefix: str) -> Path:
    """Write the page of a study, and beside it the figures that it shows.

    Args:
        path: of the page.
        results: content of `results.json`.
        prefix: of the figures' file names.
    """
    study = get_study(results["study"])
    figures = study.figures(results)
    for figure in figures:
        atomic_write_bytes(path.parent / f"{prefix}{figure.name}.svg", figure.svg)
    shown = [line for figure in figures for line in (f"![{figure.title}]({prefix}{figure.name}.svg)", "")]
    lines = [f"# {study.title}", "", *study.body(results), *shown, *_circumstances(results), *_on_machines(results), ""]
    return atomic_write_text(path, "\n".join(lines))


def _circumstances(results: Json) -> list[str]:
    recipe: Json = results["recipe"]
    options = recipe["optimisation"]
    return [
        f"Scale `{results['scale']}`, {results['seeds']} seed(s); per run {options['max_tokens']:,} tokens in steps of "
        f"{steps_text(results)}; schedule {options['schedule']} and {options['warmup_steps']} steps of warm-up for all "
        "variants; learning rates "
        + ("chosen per variant on seed 0 (table)." if _is_tuned(results) else "the same for all.")
        + f" {sum(sum(variant['minutes']) for variant in results['variants']):,.0f} minutes of training in all.",
        "",
        f"Command: `{results['command']}`.",
        "",
    ]


def _on_machines(results: Json) -> list[str]:
    """Return a line per machine; runs of which it is not known are taken to be of the one that wrote the results."""
    found = results.get("machines") or [{"machine": results["machine"]}]
    texts = [", ".join(f"{name} {value}" for name, value in entry["machine"].items()) for entry in found]
    if len(found) == 1:
        return [f"Machine: {texts[0]}."]
    return [f"- {entry['runs']} runs on: {text}." for entry, text in zip(found, texts, strict=True)]


def _is_tuned(results: Json) -> bool:
    return any(variant["tuning"] for variant in results["variants"])


def _portable(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe without the paths of this machine: folders by their last part."""
    value: dict[str, Any] = recipe.model_dump(mode="json")
    for section, key in (("data", "background"), ("tokenizer", "path")):
        found = (value.get(section) or {}).get(key)
        if found is not None and not found.startswith("hf:"):
            value[section][key] = Path(found).name
    return value
