"""Figures of the benchmark of update rules; colours, markers and dashes are those of the other benchmarks."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, StrMethodFormatter

from mnemon.bench.ops.competitors import CHUNKWISE, KERNEL
from mnemon.bench.ops.results import OpsRun, StepRow
from mnemon.bench.plots import COLOURS, LINES, MARKERS, STYLE, Chart, png, short_count
from mnemon.bench.timing import paired_ratios, quartiles

_NAMES = (CHUNKWISE, "recurrent", "transformers", "fla", KERNEL)
_COLUMNS = 4


def all_charts(run: OpsRun) -> list[Chart]:
    """Draw every figure the results allow."""
    charts = []
    with matplotlib.rc_context(STYLE):
        for what, title in (("forward", "forward"), ("backward", "forward and backward")):
            if any(row.what == what and row.seconds for row in run.passes):
                charts.append(_speed_chart(run, what, title))
        if run.steps:
            charts.append(_step_chart(run.steps))
    return charts


def _speed_chart(run: OpsRun, what: str, title: str) -> Chart:
    """Draw tokens per second over the length, a panel for each rule, all on the same axes."""
    rules = list(dict.fromkeys(row.rule for row in run.passes))
    columns = min(_COLUMNS, len(rules))
    lines = -(-len(rules) // columns)
    figure = Figure(figsize=(2.5 * columns + 0.8, 2.1 * lines + 0.9), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    shown: set[str] = set()
    for axes, rule in zip(panels, rules, strict=False):
        for index, name in enumerate(_NAMES):
            rows = [row for row in run.passes if (row.rule, row.what, row.name) == (rule, what, name) and row.seconds]
            if rows:
                shown.add(name)
                axes.plot([row.length for row in rows], [row.speed for row in rows], **_line(index))
        _log_axes(axes, run.settings.lengths)
        axes.tick_params(labelbottom=True, labelsize=7)
        axes.set_title(rule, fontsize=9)
    for axes in panels[len(rules) :]:
        axes.set_visible(False)
    figure.supxlabel("tokens per sequence", fontsize=9)
    figure.supylabel(f"tokens per second, {title}", fontsize=9)
    handles = [Line2D([], [], label=name, **_line(index)) for index, name in enumerate(_NAMES) if name in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, handlelength=4)
    return Chart(f"{what}.png", f"Tokens per second over the length of a sequence, {title}", png(figure))


def _step_chart(rows: list[StepRow]) -> Chart:
    """Draw a step's time over that of a copy of the state."""
    figure = Figure(figsize=(7.0, 0.3 * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots()
    spreads = [quartiles(paired_ratios(row.step_seconds, row.clone_seconds)) for row in rows]
    errors = [[median - low for low, median, _ in spreads], [high - median for _, median, high in spreads]]
    places = list(range(len(rows)))
    axes.barh(places, [median for _, median, _ in spreads], 0.6, xerr=errors, color=COLOURS[1])
    axes.axvline(1, color="#666666", linewidth=1)
    axes.set_yticks(places, [row.rule for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_xlabel("time of one step / time of state.clone(), median and quartiles")
    return Chart("step.png", "One step beside a copy of the state", png(figure))


def _line(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": LINES[index], "markersize": 4}


def _log_axes(axes: Axes, lengths: tuple[int, ...]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [short_count(length) for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 3)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(color="#dddddd")
