"""The results of the benchmark of update rules as Markdown: targets, ratios, tables, and what was left out."""

from collections.abc import Sequence

from mnemon.bench.ops.results import OpsRun
from mnemon.bench.ops.settings import MIB
from mnemon.bench.ops.targets import Ratio, all_ratios
from mnemon.bench.report import grid, spread
from mnemon.bench.timing import paired_ratios, quartiles

_TITLES = {"forward": "Forward", "backward": "Forward and backward"}


def markdown(run: OpsRun, figures: Sequence[tuple[str, str]] = ()) -> str:
    """Write the page of a run.

    Args:
        run: the results.
        figures: title and file name of every figure to show.
    """
    settings = run.settings
    parts = [
        "# Speed of the update rules\n",
        "Written by `mnemon bench ops`; do not edit.\n",
        f"Batch {settings.batch_size}, {settings.num_heads} heads, key and value width {settings.head_dim}, "
        f"{settings.num_slots} slots where a rule has slots; {settings.dtype} on {settings.device}, threads: "
        f"{settings.threads}. Everybody in one process, {settings.repeats} interleaved rounds, fresh inputs for every "
        "run.\n",
    ]
    faults = run.faults()
    if faults:
        parts += ["## Faults\n", "".join(f"- {fault}\n" for fault in faults)]
    parts += [f"![{title}]({name})\n" for title, name in figures]
    ratios = all_ratios(run)
    if ratios:
        parts += ["## Ratios and targets\n", verdict_line(ratios), ratio_table(ratios)]
    for what, title in _TITLES.items():
        if any(row.what == what for row in run.passes):
            parts += [f"## {title}\n", pass_table(run, what)]
    if run.steps:
        parts += ["## One step\n", step_table(run)]
    if run.agreements:
        parts += ["## Agreement with the chunkwise form\n", agreement_table(run)]
    facts = "".join(f"- {name}: {value}\n" for name, value in run.machine.items())
    return "\n".join([*parts, "## Made with\n", f"`{run.command}`\n", facts])


def verdict_line(ratios: Sequence[Ratio]) -> str:
    """Count the targets that are reached."""
    judged = [ratio.passed for ratio in ratios if ratio.passed is not None]
    if not judged:
        return "None of these lengths has a target.\n"
    return f"{sum(judged)} of {len(judged)} targets are reached.\n"


def ratio_table(ratios: Sequence[Ratio]) -> str:
    """Write the table of ratios, each with its target and whether it is reached."""
    header = ("rule", "pass", "ratio", "median [quartiles]", "ratio of minima", "target", "")
    body = []
    for ratio in ratios:
        low, median, high = ratio.quartiles
        target = "–" if ratio.target is None else f"{'≤' if ratio.at_most else '≥'} {ratio.target:g}"
        verdict = {True: "pass", False: "FAIL", None: ""}[ratio.passed]
        measured = f"{median:.2f} [{low:.2f}–{high:.2f}]"
        body.append(
            (ratio.rule, _pass_name(ratio.what), ratio.label, measured, f"{ratio.of_minima:.2f}", target, verdict)
        )
    return grid(header, body, text_columns=3)


def pass_table(run: OpsRun, what: str) -> str:
    """Write the times of forward, or of forward and backward, and what was left out."""
    rows = [row for row in run.passes if row.what == what]
    body = [
        (row.rule, row.name, f"{row.length:,}", spread(row.seconds), f"{row.speed:,.0f}") for row in rows if row.seconds
    ]
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if row.skipped:
            left_out.setdefault(f"{row.rule}, {row.name}: {row.skipped}", []).append(f"{row.length:,}")
    notes = "".join(f"- Left out at {' and '.join(lengths)}: {reason}.\n" for reason, lengths in left_out.items())
    header = ("rule", "by", "tokens", "ms: median (minimum; quartiles)", "tokens/s")
    return f"{grid(header, body, text_columns=2)}\n{notes}"


def step_table(run: OpsRun) -> str:
    """Write the times of one step beside a copy of the state."""
    header = ("rule", "sequences", "state, MiB", "step, ms", "clone, ms", "step / clone [quartiles]", "tokens/s")
    body = []
    for row in run.steps:
        low, median, high = quartiles(paired_ratios(row.step_seconds, row.clone_seconds))
        body.append(
            (
                row.rule,
                row.sequences,
                f"{row.state_bytes / MIB:.0f}",
                spread(row.step_seconds),
                spread(row.clone_seconds),
                f"{median:.2f} [{low:.2f}–{high:.2f}]",
                f"{row.sequences / quartiles(row.step_seconds)[1]:,.0f}",
            )
        )
    note = "One token for every sequence of a batch, beside `state.clone()` in the same round.\n"
    return f"{grid(header, body)}\n{note}"


def agreement_table(run: OpsRun) -> str:
    """Write how far competitors are from the chunkwise form: the largest distance of each."""
    header = ("rule", "by", "tokens", "largest distance", "of", "at most", "")
    body = []
    keys = dict.fromkeys((row.rule, row.name, row.length) for row in run.agreements)
    for key in keys:
        rows = [row for row in run.agreements if (row.rule, row.name, row.length) == key]
        worst = max(rows, key=lambda row: (not row.holds, row.distance))
        verdict = "equal" if worst.holds else "DIFFERENT"
        body.append((*key[:2], f"{key[2]:,}", f"{worst.distance:.1e}", worst.what, f"{worst.tolerance:.0e}", verdict))
    return grid(header, body, text_columns=2)


def _pass_name(what: str) -> str:
    return _TITLES[what].lower()
