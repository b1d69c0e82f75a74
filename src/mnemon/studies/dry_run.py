"""What a study would train: sizes, tokens, time, launch lines. Nothing is trained or written here."""

from __future__ import annotations

from pathlib import Path

from mnemon.studies.equal_size import refuse_unequal
from mnemon.studies.estimate import launch_lines, open_data, run_seconds, training_flop
from mnemon.studies.execution import Report, is_finished
from mnemon.studies.order import Order
from mnemon.studies.planning import base_recipe, choose_variants, counted_facts, model_facts, plan_runs
from mnemon.studies.study import Json, PlannedRun, Study


def dry_run(order: Order, root: Path, report: Report = lambda text: None) -> Json:
    """Return what a study would train, how large it is and how long it takes.

    Args:
        order: what is wanted.
        root: folder of the study; runs that are there tell how long others take.
        report: told which model is looked at, for large ones take a while.

    Returns:
        `study`, `scale`; `runs`: name, parameters, tokens, whether it is `finished`, and `seconds` `from` where,
        `state_bytes` after `length` tokens; or `flop`, `data` and `launch` where runs are too large for this command;
        `total_tokens`.

    Raises:
        ConfigError: a name, a pattern or a change is refused.
    """
    study, scale = order.resolve()
    base = base_recipe(study, scale, order.changes)
    variants = choose_variants(study, scale, base, order.only)
    length = base.data.stages[-1].length
    runs = plan_runs(study, scale, variants, scale.seeds, order.changes)
    if study.equal_parameters:
        refuse_unequal(runs)
    rows: list[Json] = []
    facts: dict[str, Json] = {}
    opened: dict[str, dict[str, int]] = {}
    for run in runs:
        if run.variant.name not in facts:
            report(f"looking at {run.variant.name}")
            facts[run.variant.name] = (
                _launched_facts(run, opened) if scale.launched else _facts(study, run, root, length)
            )
        row = {"name": run.name, "tokens": run.recipe.optimisation.max_tokens, **facts[run.variant.name]}
        rows.append(row | ({"launch": launch_lines(run, root)} if scale.launched else {}))
        rows[-1]["finished"] = is_finished(run, root)
    total = sum(row["tokens"] for row in rows)
    equal = study.equal_parameters
    named = {"study": order.study, "scale": order.scale, "length": length}
    return {**named, "equal_parameters": equal, "runs": rows, "total_tokens": total}


def _facts(study: Study, run: PlannedRun, root: Path, length: int) -> Json:
    known = model_facts(run.recipe, [length])
    return {
        "parameters": known["parameters"],
        "state_bytes": known["state_bytes"][str(length)],
        **run_seconds(study, run, root),
    }


def _launched_facts(run: PlannedRun, opened: dict[str, dict[str, int]]) -> Json:
    """Return size, arithmetic and the data of a run; data of the same kind is opened once."""
    data = f"{run.recipe.data.model_dump_json()}{run.recipe.tokenizer}"
    if data not in opened:
        opened[data] = open_data(run.recipe)
    counted = counted_facts(run.recipe)
    tokens = run.recipe.optimisation.max_tokens
    assert tokens is not None  # checked by the planning
    return {
        "parameters": counted["parameters"],
        "flop": training_flop(counted["parameters"]["active"], tokens),
        "data": opened[data],
    }
