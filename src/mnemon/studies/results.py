"""From finished runs to `results.json`, and from that file to the page and its figures: no number is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mnemon.errors import DataError
from mnemon.evaluation.machine import describe_machine
from mnemon.files import atomic_write_bytes, atomic_write_json, atomic_write_text, prepare_output_folder
from mnemon.studies.execution import MEASURES, execute, read_json, refuse_other
from mnemon.studies.planning import base_recipe, choose_variants, model_facts, plan_runs
from mnemon.studies.registry import get_scale, get_study
from mnemon.studies.study import Json, PlannedRun, Scale, Study, Variant
from mnemon.training.recipe import Recipe
from mnemon.training.run import SUMMARY_FILE
from mnemon.training.trainer import wants_cuda

FORMAT = "mnemon-study-1"
PLAN, RESULTS, PAGE = "study.json", "results.json", "page.md"


def dry_run(name: str, scale_name: str, seeds: int | None, only: Sequence[str], changes: Sequence[str]) -> Json:
    """Return what a study would train.

    Args:
        name: of the study.
        scale_name: size.
        seeds: number of seeds; None = the scale's.
        only: patterns of variants; none = all.
        changes: `section.key=value` for all runs.

    Returns:
        `study`, `scale`; `runs`: name, parameters, `state_bytes` after `length` tokens, tokens; `total_tokens`.

    Raises:
        ConfigError: a name, a pattern or a change is refused.
    """
    study = get_study(name)
    scale = get_scale(study, scale_name)
    base = base_recipe(study, scale, changes)
    variants = choose_variants(study, scale, base, only)
    length = base.data.stages[-1].length
    rows: list[Json] = []
    facts: dict[str, Json] = {}
    for run in plan_runs(study, scale, variants, seeds or scale.seeds, changes):
        known = facts.setdefault(run.variant.name, {}) or model_facts(run.recipe, [length])
        facts[run.variant.name] = known
        rows.append(
            {
                "name": run.name,
                "parameters": known["parameters"],
                "state_bytes": known["state_bytes"][str(length)],
                "tokens": run.recipe.optimisation.max_tokens,
            }
        )
    total = sum(row["tokens"] for row in rows)
    return {"study": name, "scale": scale_name, "length": length, "runs": rows, "total_tokens": total}


def reproduce(
    name: str,
    scale_name: str,
    root: Path,
    *,
    seeds: int | None = None,
    only: Sequence[str] = (),
    changes: Sequence[str] = (),
    tune: Sequence[float] = (),
    jobs: int = 1,
    overwrite: bool = False,
    command: str = "",
    report: Callable[[str], None] = lambda _: None,
) -> Json:
    """Run a study, or what is left of it, and write its results.

    Args:
        name: of the study.
        scale_name: size.
        root: folder; finished runs in it are kept, interrupted ones go on.
        seeds: number of seeds; None = the scale's.
        only: patterns of variants; none = all.
        changes: `section.key=value` for all runs.
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
    study = get_study(name)
    scale = get_scale(study, scale_name)
    base = base_recipe(study, scale, changes)
    variants = choose_variants(study, scale, base, only)
    plan_runs(study, scale, variants, 1, changes)  # whatever is wrong with a variant is told before anything starts
    _prepare_root(root, {"study": name, "scale": scale_name, "recipe": base.model_dump(mode="json")}, overwrite)
    changes = [*changes, *study.prepare(base, root)]
    scores = _tune(study, scale, variants, tune, changes, root, jobs, report)
    rates = {variant: max(found, key=lambda rate: found[rate]) for variant, found in scores.items()}
    runs = plan_runs(study, scale, variants, seeds or scale.seeds, changes, rates if tune else None)
    execute(study, runs, root, jobs, report)
    base = base_recipe(study, scale, changes)
    facts: Json = {
        "format": FORMAT,
        "study": name,
        "scale": scale_name,
        "seeds": seeds or scale.seeds,
        "samples": scale.samples,
        "command": command,
        "machine": _machine(base),
        "recipe": _portable(base),
    }
    results = facts | collect(study, runs, root, scores)
    atomic_write_json(root / RESULTS, results)
    write_page(root / PAGE, results, "")
    return results


def _prepare_root(root: Path, plan: Json, overwrite: bool) -> None:
    """Make the folder of a study, or make sure that the study in it is this one, whatever of it has run already."""
    begun = (root / PLAN).is_file() and not overwrite
    if begun:
        refuse_other(root, read_json(root / PLAN), plan)
    prepare_output_folder(root, overwrite, resume=begun, resumable=False)
    atomic_write_json(root / PLAN, plan)


def collect(study: Study, runs: Sequence[PlannedRun], root: Path, scores: Mapping[str, Mapping[float, float]]) -> Json:
    """Return `variants` (facts and rows) and whatever else the study makes of its finished runs."""
    by_variant: dict[str, list[PlannedRun]] = {}
    for run in runs:
        by_variant.setdefault(run.variant.name, []).append(run)
    variants = [_variant_facts(study, own, root, scores) for own in by_variant.values()]
    measures = {name: [read_json(run.folder(root) / MEASURES) for run in own] for name, own in by_variant.items()}
    further = study.analyse(variants, measures)
    return {"variants": variants, **further}


def _variant_facts(
    study: Study, runs: Sequence[PlannedRun], root: Path, scores: Mapping[str, Mapping[float, float]]
) -> Json:
    variant: Variant = runs[0].variant
    summaries = [read_json(run.folder(root) / SUMMARY_FILE) for run in runs]
    found = scores.get(variant.name, {})
    return {
        "name": variant.name,
        "rule": variant.rule,
        "arm": variant.arm,
        "changes": list(variant.changes),
        "learning_rate": runs[0].recipe.optimisation.learning_rate,
        "tuning": {f"{rate:g}": score for rate, score in found.items()},
        **model_facts(runs[0].recipe, study.lengths(runs[0].recipe)),
        "tokens": [summary["tokens"] for summary in summaries],
        "minutes": [summary["minutes"] for summary in summaries],
    }


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
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    lines = [f"# {study.title}", "", *study.body(results), *shown, *_circumstances(results), f"Machine: {machine}.", ""]
    return atomic_write_text(path, "\n".join(lines))


def _circumstances(results: Json) -> list[str]:
    recipe: Json = results["recipe"]
    options = recipe["optimisation"]
    return [
        f"Scale `{results['scale']}`, {results['seeds']} seed(s); per run {options['max_tokens']:,} tokens in steps of "
        f"{options['batch_tokens']:,}, schedule {options['schedule']}, {options['warmup_steps']} steps of warm-up, the "
        "same for all variants; learning rates "
        + ("chosen per variant on seed 0 (table)." if _is_tuned(results) else "the same for all.")
        + f" {sum(sum(variant['minutes']) for variant in results['variants']):,.0f} minutes of training in all.",
        "",
        f"Command: `{results['command']}`.",
        "",
    ]


def _is_tuned(results: Json) -> bool:
    return any(variant["tuning"] for variant in results["variants"])


def _machine(recipe: Recipe) -> dict[str, str]:
    """Describe the machine as the runs used it."""
    facts = describe_machine("cuda" if wants_cuda(recipe.optimisation) else "cpu")
    threads = recipe.optimisation.threads
    return facts if threads is None else {**facts, "threads": f"{threads} per run"}


def _portable(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe without the paths of this machine: folders by their last part."""
    value: dict[str, Any] = recipe.model_dump(mode="json")
    for section, key in (("data", "background"), ("tokenizer", "path")):
        found = (value.get(section) or {}).get(key)
        if found is not None and not found.startswith("hf:"):
            value[section][key] = Path(found).name
    return value
