"""Measure update rules: the contract first, then forward and backward of every competitor in turn, then one step."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mnemon.bench.ops.competitors import CHUNKWISE, Competitor, Run, competitors, draw
from mnemon.bench.ops.results import Agreement, OpsRun, PassRow, StepRow
from mnemon.bench.ops.settings import OpsSettings
from mnemon.bench.run import circumstances
from mnemon.bench.timing import cpu_threads, interleave, kept_memory
from mnemon.evaluation.machine import describe_machine
from mnemon.ops import get_rule
from mnemon.ops.checks import CHECKS, variants
from mnemon.ops.rule import UpdateRule
from mnemon.ops.state import combine, leaves

TOLERANCES = {"float32": 5e-3, "bfloat16": 2e-2, "float16": 1e-2}
"""Distance at which a competitor still computes the same; GPU kernels round the factors of float32 products."""

Report = Callable[[str], None]


def run_ops_benchmark(settings: OpsSettings, command: str, report: Report) -> OpsRun:
    """Measure every rule that keeps the contract; the others are named with the check that failed.

    Args:
        settings: what to measure.
        command: how it was asked for, for the record.
        report: told what is measured next.

    Raises:
        ConfigError: for an unknown rule.
    """
    rules = [get_rule(name) for name in settings.rules]
    refused: dict[str, str] = {}
    passes: list[PassRow] = []
    steps: list[StepRow] = []
    agreements: list[Agreement] = []
    with cpu_threads(settings.threads), _quiet_collector(), kept_memory() as allocator:
        machine = {**describe_machine(settings.device), "allocator": allocator, **circumstances()}
        for rule in rules:
            report(f"{rule.name}: contract")
            fault = broken_contract(rule, settings.all_variants)
            if fault:
                refused[rule.name] = fault
                report(f"{rule.name}: not measured, {fault}")
                continue
            if {"forward", "backward"} & set(settings.parts):
                entrants = competitors(rule, settings)
                agreements += compare(rule, entrants, settings)
                for what in ("forward", "backward"):
                    if what in settings.parts:
                        passes += measure_passes(rule, what, entrants, settings, report)
            if "step" in settings.parts:
                report(f"{rule.name}: one step")
                steps.append(measure_step(rule, settings))
    return OpsRun(settings, command, machine, passes, steps, agreements, refused)


def broken_contract(rule: UpdateRule, all_variants: bool) -> str:
    """Run the contract's checks on a rule.

    Args:
        rule: the rule.
        all_variants: with every setting of the rule; else with its defaults.

    Returns:
        The first check that failed and why, or an empty string.
    """
    for check in CHECKS:
        for options in variants(rule) if all_variants else [{}]:
            try:
                check(rule, options)
            except Exception as error:  # the rule may be anybody's, and so may be what it raises
                return " ".join(f"{check.__name__}: {error}".split())
    return ""


def compare(rule: UpdateRule, entrants: list[Competitor], settings: OpsSettings) -> list[Agreement]:
    """Compare everybody else with the chunkwise form: outputs, and with the fla form all gradients and the state.

    Published code is compared at the shortest length, the fla form at every length. The recurrent form has been
    compared by the contract's checks.
    """
    by_name = {entrant.name: entrant for entrant in entrants if not entrant.refusal}
    rows = []
    for name, lengths in (("fla", settings.lengths), ("transformers", settings.lengths[:1])):
        if name not in by_name or CHUNKWISE not in by_name:
            continue
        for length in lengths:
            expected, got = (_results(by_name[who], length, gradients=name == "fla") for who in (CHUNKWISE, name))
            rows += [
                Agreement(rule.name, name, what, length, _distance(got[what], values), TOLERANCES[settings.dtype])
                for what, values in expected.items()
            ]
    return rows


def measure_passes(
    rule: UpdateRule, what: str, entrants: list[Competitor], settings: OpsSettings, report: Report
) -> list[PassRow]:
    """Time forward, or forward and backward, of every competitor at every length; all of them take turns.

    Every length is tried once before, from the shortest on. A competitor whose next length is expected to take longer
    than the time limit gets no more lengths, and the rows say so.
    """
    runs: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    keys = [(length, entrant) for length in settings.lengths for entrant in entrants]
    tried: dict[str, tuple[int, float]] = {}
    report(f"{rule.name}: {what}, once at every length")
    for length, entrant in keys:
        key = _key(entrant, length)
        reason = _why_not(entrant, length, tried.get(entrant.name), settings.time_limit)
        if reason:
            skipped[key] = reason
            continue
        runs[key] = Run(entrant, length, what == "backward")
        warm_ups = 0 if entrant.name in tried else 1
        tried[entrant.name] = (length, _time({key: runs[key]}, 1, settings.device, warm_ups)[key][0])
    report(f"{rule.name}: {what}, {settings.repeats} rounds")
    seconds = _time(runs, settings.repeats, settings.device, warm_ups=0)
    return [
        PassRow(
            rule.name, what, entrant.name, settings.batch_size * length, length,
            seconds.get(_key(entrant, length), []), skipped.get(_key(entrant, length), ""),
        )
        for length, entrant in keys
    ]  # fmt: skip


def measure_step(rule: UpdateRule, settings: OpsSettings) -> StepRow:
    """Time one token of many sequences, and a copy of their state, in turn."""
    one = _after_one_token(rule, settings, 1)
    sequences = max(1, math.ceil(settings.step_bytes / _bytes(one)))
    state = _after_one_token(rule, settings, sequences)
    given: dict[str, Any] = {}

    def prepare(_: str) -> None:
        given.clear()
        given.update(draw(rule, settings, sequences, 1), state=combine(lambda x: x.clone(), state))

    def step() -> object:
        with torch.no_grad():
            return rule.recurrent(**given)

    def clone() -> object:
        return combine(lambda x: x.clone(), given["state"])

    seconds = interleave({"step": step, "clone": clone}, settings.repeats, settings.device, before=prepare)
    return StepRow(rule.name, sequences, _bytes(state), seconds["step"], seconds["clone"])


def _time(runs: dict[str, Run], repeats: int, device: str, warm_ups: int) -> dict[str, list[float]]:
    """Interleave runs; only the inputs of the next one exist."""

    def before(name: str) -> None:
        for run in runs.values():
            run.release()
        runs[name].prepare()

    seconds = interleave(runs, repeats, device, warm_ups, before)
    for run in runs.values():
        run.release()
    return seconds


def _why_not(entrant: Competitor, length: int, last: tuple[int, float] | None, time_limit: float) -> str:
    """Say why a length is left out, or return an empty string."""
    if entrant.refusal:
        return entrant.refusal
    if entrant.limit is not None and length > entrant.limit:
        return f"measured up to {entrant.limit:,} tokens only"
    expected = 0.0 if last is None else last[1] * (length / last[0]) ** entrant.growth
    if expected > time_limit:
        return f"a run would take about {expected:.1f} s, limit {time_limit:g} s"
    return ""


def _results(entrant: Competitor, length: int, gradients: bool) -> dict[str, torch.Tensor]:
    """Compute output and, if asked for, state and all gradients, once."""
    run = Run(entrant, length, gradients)
    run.prepare()
    found = run()
    if gradients:
        with torch.no_grad():
            states = leaves(entrant.compute(**entrant.arguments(length))[1])
        found |= {f"state {number}": state for number, state in enumerate(states)}
    return found


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Divide the root mean square of the difference by that of the expected values."""
    difference, size = (got.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / size if size > 0 else difference


def _after_one_token(rule: UpdateRule, settings: OpsSettings, sequences: int) -> Any:
    with torch.no_grad():
        return rule.recurrent(**draw(rule, settings, sequences, 1))[1]


def _bytes(state: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def _key(entrant: Competitor, length: int) -> str:
    return f"{entrant.name} {length}"


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keep what exists already out of the garbage collections between runs, which would take longer than the runs."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
