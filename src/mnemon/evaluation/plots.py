"""Figures of an evaluation: accuracy over length, one panel per task, and the five capability groups.

Drawn without any window system, in the Okabe-Ito colours with a marker and a line style of its own for every model, so
that they survive colour blindness and a grey printer. Each figure is returned as PNG and SVG bytes, the same bytes for
the same numbers.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.scoring import MAJORITY_LEVEL

CAPABILITY_GROUPS: dict[str, tuple[str, ...]] = {
    "single-step\nreasoning": ("qa1",),
    "multi-step\nreasoning": ("qa2", "qa3"),
    "relation\ntracking": ("qa4", "qa5"),
    "basic\nqueries": ("qa6", "qa7", "qa8"),
    "negation &\nuncertainty": ("qa9", "qa10"),
}
"""The groups of figure 3 of the LM2 paper (arXiv:2502.06049)."""

TASK_NAMES: dict[str, str] = {
    "qa1": "single supporting fact",
    "qa2": "two supporting facts",
    "qa3": "three supporting facts",
    "qa4": "two-argument relations",
    "qa5": "three-argument relations",
    "qa6": "yes/no questions",
    "qa7": "counting",
    "qa8": "lists and sets",
    "qa9": "simple negation",
    "qa10": "indefinite knowledge",
}

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
# As many markers, lines and colours as have no common factor: 280 models before two look alike.
_LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_LEGEND_CHARACTERS = 15.5  # per inch, at the legend's size of type
_HANDLE_CHARACTERS = 13.7
_MOST_AREAS = 4  # beyond that shaded areas hide each other
_INK, _SOFT, GRID_COLOUR = "#222222", "#666666", "#dddddd"

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#aaaaaa",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.hashsalt": "mnemon",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Plot:
    """One figure in both formats.

    Attributes:
        name: file name without ending.
        title: what it shows, for a caption or alternative text.
    """

    name: str
    title: str
    png: bytes
    svg: bytes


def all_plots(comparison: Comparison) -> list[Plot]:
    """Draw every figure that makes sense for a comparison."""
    plots = [plot_accuracy_over_length(comparison)]
    if len(comparison.settings.tasks) > 1:
        plots.append(plot_tasks(comparison))
    if capability_groups(comparison.settings.tasks):
        plots.append(plot_capabilities(comparison))
    return plots


def plot_accuracy_over_length(comparison: Comparison) -> Plot:
    """Draw mean accuracy over context length, one line per model, 95 % intervals as bars and bands."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        _draw_lines(axes, comparison, None)
        level = comparison.majority_level()
        _draw_level(axes, level)
        _dress(axes, comparison)
        guess = "" if level is None else f"dotted grey: always the most frequent answer ({100 * level:.0f} %)"
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel("accuracy, %")
        figure.supxlabel(guess, fontsize=8.5, color=_SOFT)
        tasks = comparison.settings.tasks
        listed = ", ".join(tasks) if len(tasks) <= 5 else f"{len(tasks)} tasks"
        name = f"mean over {listed}" if len(tasks) > 1 else tasks[0]
        add_legend(figure, axes, f"BABILong accuracy over length, {name}")
        return finish(figure, "accuracy_over_length", "Accuracy over context length")


def plot_tasks(comparison: Comparison) -> Plot:
    """Draw accuracy over length for every task in a panel of its own, with the level of guessing."""
    tasks = comparison.settings.tasks
    columns = min(len(tasks), 2 if len(tasks) <= 4 else 3 if len(tasks) <= 6 else 5)
    rows = -(-len(tasks) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(3.1 * columns, 6.6), 2.5 * rows + 0.9), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, task in zip(grid.flat, tasks, strict=False):
            _draw_lines(axes, comparison, task, small=True)
            _draw_level(axes, MAJORITY_LEVEL.get(task))
            _dress(axes, comparison)
            axes.set_title(f"{task}  {TASK_NAMES.get(task, '')}", loc="left", color=_INK)
        for axes in list(grid.flat)[len(tasks) :]:
            axes.remove()
        figure.supylabel("accuracy, %", fontsize=10)
        figure.supxlabel(
            "context length (tokens); dotted grey: always the most frequent answer", fontsize=9, color=_SOFT
        )
        add_legend(figure, grid.flat[0], "BABILong accuracy over length, task by task")
        return finish(figure, "accuracy_by_task", "Accuracy over context length for every task")


def plot_capabilities(comparison: Comparison) -> Plot:
    """Draw the capability groups as a radar, or as bars where fewer than three groups were evaluated.

    Groups without an evaluated task are left out and named below the figure.
    """
    groups = capability_groups(comparison.settings.tasks)
    absent = [name.replace("\n", " ") for name in CAPABILITY_GROUPS if name not in groups]
    with matplotlib.rc_context(STYLE):
        radar = len(groups) >= 3
        figure = Figure(figsize=(6.4, 6.2) if radar else (6.4, 4.4), layout="constrained")
        draw = _draw_radar if radar else _draw_bars
        axes = draw(figure, comparison, groups)
        add_legend(figure, axes, f"Capability groups, mean over {_lengths(comparison)}")
        if absent:
            figure.supxlabel(f"not evaluated: {', '.join(absent)}", fontsize=8.5, color=_SOFT)
        return finish(figure, "capabilities", "Capability groups of the LM2 paper's figure 3")


def capability_groups(tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Give the groups that have at least one of the tasks, with these tasks only."""
    chosen = {name: tuple(task for task in group if task in tasks) for name, group in CAPABILITY_GROUPS.items()}
    return {name: group for name, group in chosen.items() if group}


def side_step(index: int, count: int) -> float:
    """Return how far model `index` of `count` stands beside a category, so that the bars of equal models stay apart."""
    return (index - (count - 1) / 2) * min(0.07, 0.4 / count)


def _draw_lines(axes: Any, comparison: Comparison, task: str | None, *, small: bool = False) -> None:
    lengths, labels = comparison.settings.lengths, comparison.labels
    for index, label in enumerate(labels):
        intervals = [comparison.accuracy(label, length, task) for length in lengths]
        mean = np.array([100 * interval.mean for interval in intervals])
        low = np.array([100 * interval.low for interval in intervals])
        high = np.array([100 * interval.high for interval in intervals])
        place = np.arange(len(lengths)) + side_step(index, len(labels))
        style = series_style(index)
        if len(labels) <= _MOST_AREAS:
            axes.fill_between(place, low, high, color=style["color"], alpha=0.08, linewidth=0)
        axes.errorbar(
            place,
            mean,
            yerr=[mean - low, high - mean],
            label=label,
            markersize=4.5 if small else 7,
            linewidth=1.5 if small else 2.1,
            elinewidth=1,
            capsize=0 if small else 2.5,
            markeredgecolor="white",
            markeredgewidth=0.6 if small else 0.9,
            zorder=10 - index,
            **style,
        )


def _draw_level(axes: Any, level: float | None) -> None:
    if level is not None:
        axes.axhline(100 * level, color=_SOFT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)


def _dress(axes: Any, comparison: Comparison) -> None:
    lengths = comparison.settings.lengths
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_xlim(-0.35, len(lengths) - 0.65)
    axes.set_ylim(0, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _draw_radar(figure: Any, comparison: Comparison, groups: dict[str, tuple[str, ...]]) -> Any:
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    angles = np.linspace(0, 2 * np.pi, len(groups), endpoint=False)
    closed = np.append(angles, angles[0])
    for index, label in enumerate(comparison.labels):
        values = [100 * comparison.group_accuracy(label, tasks).mean for tasks in groups.values()]
        values.append(values[0])
        style = series_style(index)
        axes.plot(closed, values, label=label, linewidth=2, markersize=6, zorder=10 - index, **style)
        if len(comparison.labels) <= _MOST_AREAS:
            axes.fill(closed, values, color=style["color"], alpha=0.07)
    axes.set_xticks(angles, [f"{name}\n({', '.join(tasks)})" for name, tasks in groups.items()])
    axes.tick_params(axis="x", pad=20, labelsize=9.5)
    axes.set_ylim(0, 100)
    axes.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100 %"], fontsize=8, color=_SOFT)
    axes.set_rlabel_position(180 / len(groups))
    axes.grid(color=GRID_COLOUR, linewidth=0.8)
    axes.spines["polar"].set_color(GRID_COLOUR)
    return axes


def _draw_bars(figure: Any, comparison: Comparison, groups: dict[str, tuple[str, ...]]) -> Any:
    axes = figure.add_subplot()
    width = 0.8 / len(comparison.labels)
    hatches = ("", "///", "...", "\\\\\\", "xx", "++", "oo")
    for index, label in enumerate(comparison.labels):
        intervals = [comparison.group_accuracy(label, tasks) for tasks in groups.values()]
        mean = np.array([100 * interval.mean for interval in intervals])
        errors = [[100 * (i.mean - i.low) for i in intervals], [100 * (i.high - i.mean) for i in intervals]]
        place = np.arange(len(groups)) + (index - (len(comparison.labels) - 1) / 2) * width
        axes.bar(
            place,
            mean,
            0.9 * width,
            yerr=errors,
            label=label,
            color=series_style(index)["color"],
            hatch=hatches[index % len(hatches)],
            edgecolor="white",
            linewidth=0,
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2.5},
        )
    axes.set_xticks(range(len(groups)), [f"{name}\n({', '.join(tasks)})" for name, tasks in groups.items()])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, 103)
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    return axes


def add_legend(figure: Any, axes: Any, title: str) -> None:
    """Put title and legend above the axes, in one block so that neither covers the other."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=title,
        title_fontproperties={"size": 12, "weight": "bold"},
        loc="outside upper center",
        ncols=_legend_columns(labels, figure.get_figwidth()),
        frameon=False,
        fontsize=9,
        handlelength=4,
    )


def _legend_columns(labels: Sequence[str], inches: float) -> int:
    """Give the most columns, at most four, whose entries fit beside each other."""
    for count in (4, 3, 2):
        columns = np.array_split(np.array([len(label) for label in labels]), min(count, len(labels)))
        if sum(_HANDLE_CHARACTERS + column.max() for column in columns) <= _LEGEND_CHARACTERS * inches:
            return len(columns)
    return 1


def series_style(index: int) -> dict[str, Any]:
    """Give colour, marker and line of one series."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
    }


def _lengths(comparison: Comparison) -> str:
    lengths = comparison.settings.lengths
    return f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else lengths[0]


def finish(figure: Any, name: str, title: str) -> Plot:
    """Turn a figure into its files."""
    FigureCanvasAgg(figure)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return Plot(name, title, png.getvalue(), svg.getvalue())
