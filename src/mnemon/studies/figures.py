"""Figures of the studies, as SVG and PNG: the same bytes for the same numbers.

Okabe-Ito colours, with a marker and a line style of its own for every arm.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mnemon.evaluation.plots import GRID_COLOUR, STYLE, Plot, finish, series_style, side_step
from mnemon.studies.memory_arms import ARMS, ATTENTION
from mnemon.studies.study import Json

_LOOK: dict[str, dict[str, Any]] = {
    "single": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "mom": {"color": "#D55E00", "marker": "s", "linestyle": (0, (6, 2))},
    "enlarged": {"color": "#009E73", "marker": "^", "linestyle": (0, (1, 1.2))},
    ATTENTION: {"color": "#666666", "marker": "x", "linestyle": ":"},
}
# Of the figure of accuracy over state: on which side of its points an arm's labels stand, their height in percent, ...
_SIDE = {"single": 1, "mom": 1, "enlarged": -1, ATTENTION: 1}
_LINE, _POINTS_PER_PERCENT, _COLUMNS_PER_OCTAVE = 2.5, 2.9, 2
_STYLE: Any = STYLE | {"font.size": 9, "axes.grid": True, "grid.color": GRID_COLOUR}


def accuracy_over_pairs(variants: Sequence[Json]) -> Plot:
    """Draw accuracy over the number of pairs, a panel per rule and a line per arm, with 95 % intervals."""
    title = "Accuracy over the number of key-value pairs"
    with _panels(variants, "key-value pairs", "answered rightly, %") as (figure, panels):
        for axes, shown in panels:
            for variant in shown:
                rows = variant["rows"]
                means = [100 * row["accuracy"]["mean"] for row in rows]
                below = [100 * (row["accuracy"]["mean"] - row["accuracy"]["low"]) for row in rows]
                above = [100 * (row["accuracy"]["high"] - row["accuracy"]["mean"]) for row in rows]
                pairs = [row["num_pairs"] for row in rows]
                look = _LOOK[variant["arm"]]
                axes.errorbar(pairs, means, [below, above], label=variant["arm"], markersize=4, capsize=2, **look)
            axes.set_xscale("log", base=2)
            axes.set_xticks(pairs, [str(count) for count in pairs])
            axes.set_ylim(-3, 103)
        _legend(figure)
        return finish(figure, "accuracy-over-pairs", title)


def _apart(points: Sequence[tuple[int, float]]) -> list[float]:
    """Return how high the labels of points (bytes, percent) go so that those of one column do not cover each other."""
    places = [0.0] * len(points)
    above: dict[int, float] = {}
    for index in sorted(range(len(points)), key=lambda index: -points[index][1]):
        size, percent = points[index]
        column = round(_COLUMNS_PER_OCTAVE * math.log2(size))
        above[column] = places[index] = min(percent, above.get(column, math.inf) - _LINE)
    return places


def accuracy_over_state(variants: Sequence[Json]) -> Plot:
    """Draw mean accuracy over the bytes of the state at the longest length, a point per variant with a known arm."""
    title = "Accuracy over the bytes of the state"
    variants = [variant for variant in variants if variant["state_bytes"]]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for arm, look in _LOOK.items():
            points = [(_longest_state(v), 100 * v["mean"]["accuracy"]["mean"], v) for v in variants if v["arm"] == arm]
            if points:
                size, accuracy, _ = zip(*points, strict=True)
                axes.plot(size, accuracy, label=arm, color=look["color"], marker=look["marker"], linestyle="none")
            heights = _apart([(size, accuracy) for size, accuracy, _ in points])
            for (size_of_one, accuracy_of_one, variant), height in zip(points, heights, strict=True):
                axes.annotate(
                    variant["rule"],
                    (size_of_one, accuracy_of_one),
                    xytext=(_SIDE[arm] * 6, (height - accuracy_of_one) * _POINTS_PER_PERCENT - 2),
                    textcoords="offset points",
                    horizontalalignment="left" if _SIDE[arm] > 0 else "right",
                    fontsize=6,
                    color=look["color"],
                )
        axes.set_xscale("log", base=2)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("bytes that a sequence carries at the longest length")
        axes.set_ylabel("answered rightly, mean over the slices, %")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        return finish(figure, "accuracy-over-state", title)


def accuracy_over_length(rows: Sequence[Json]) -> Plot:
    """Draw mean accuracy over the length of the text, a line per model with 95 % intervals.

    Args:
        rows: `label` and `cells`: length name -> `mean`, an interval in 0..1.
    """
    title = "Accuracy over the length of the text"
    lengths = list(dict.fromkeys(length for row in rows for length in row["cells"]))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for number, row in enumerate(rows):
            means = [row["cells"][length]["mean"] for length in row["cells"]]
            values = [100 * mean["mean"] for mean in means]
            below = [100 * (mean["mean"] - mean["low"]) for mean in means]
            above = [100 * (mean["high"] - mean["mean"]) for mean in means]
            places = [lengths.index(length) + side_step(number, len(rows)) for length in row["cells"]]
            look = {"capsize": 2, "markersize": 5, "elinewidth": 1, **series_style(number)}
            axes.errorbar(places, values, [below, above], label=row["label"], **look)
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("tokens of text")
        axes.set_ylabel("answered rightly, mean over the tasks, %")
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        return finish(figure, "accuracy-over-length", title)


def differences_to(base: str, comparisons: Sequence[Json]) -> Plot:
    """Draw how much more each variant answers rightly than the base, with 95 % intervals.

    Args:
        base: name of what they are compared with.
        comparisons: `variant` and `difference`, an interval in -1..1.
    """
    names = [test["variant"] for test in comparisons]
    ends = [{end: 100 * test["difference"][end] for end in ("low", "mean", "high")} for test in comparisons]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 1.2 + 0.26 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        means = [end["mean"] for end in ends]
        reach = [[end["mean"] - end["low"] for end in ends], [end["high"] - end["mean"] for end in ends]]
        places = range(len(names))
        axes.errorbar(means, places, xerr=reach, fmt="o", color="#0072B2", markersize=5, capsize=2, linestyle="none")
        axes.axvline(0, color="#666666", linewidth=1)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlabel(f"answered rightly, points more than {base}")
        return finish(figure, "differences", f"Differences to {base}")


def loss_curves(variants: Sequence[Json]) -> Plot:
    """Draw the training loss over the tokens read, mean over seeds, a panel per rule and a line per arm."""
    title = "Training loss over the tokens read, from a fifth of them on"
    with _panels(variants, "tokens read, millions", "loss, nats per token") as (figure, panels):
        for axes, shown in panels:
            for variant in shown:
                look = {**_LOOK[variant["arm"]], "marker": None}
                tokens = [tokens / 1e6 for tokens, _ in variant["curve"]]
                axes.plot(tokens, [loss for _, loss in variant["curve"]], label=variant["arm"], linewidth=1.2, **look)
            axes.set_ylim(*_late_losses(variants))
        _legend(figure)
        return finish(figure, "loss-curves", title)


def loss_lines(variants: Sequence[Json], what: str) -> Plot:
    """Draw the training loss over the tokens read, mean over seeds, a line per variant in one panel.

    Args:
        variants: `arm` and `curve`: tokens and losses.
        what: the arms are, for the legend.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for number, variant in enumerate(variants):
            tokens, losses = zip(*variant["curve"], strict=True)
            look = {**series_style(number), "marker": None}
            axes.plot([count / 1e6 for count in tokens], losses, label=variant["arm"], linewidth=1.2, **look)
        axes.set_ylim(*_late_losses(variants))
        axes.set_xlabel("tokens read, millions")
        axes.set_ylabel("loss, nats per token")
        axes.legend(title=what, frameon=False)
        return finish(figure, "loss-curves", "Training loss over the tokens read, from a fifth of them on")


def _late_losses(variants: Sequence[Json]) -> tuple[float, float]:
    """Return the range of the losses after the first fifth of the tokens, where curves differ: all begin alike."""
    late = [loss for variant in variants for tokens, loss in variant["curve"] if tokens > variant["curve"][-1][0] / 5]
    margin = 0.05 * (max(late) - min(late)) or 0.1
    return min(late) - margin, max(late) + margin


def perplexity_over_blocks(variants: Sequence[Json]) -> Plot:
    """Draw perplexity over the number of blocks with memory, mean over seeds, a line per length of the context.

    Args:
        variants: `blocks`, and `rows`: length and perplexities of the seeds.
    """
    title = "Perplexity over the number of blocks with memory"
    blocks = [variant["blocks"] for variant in variants]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for number, row in enumerate(variants[0]["rows"]):
            values = [variant["rows"][number]["perplexity"]["mean"] for variant in variants]
            axes.plot(blocks, values, label=f"{row['length']:,}", markersize=5, **series_style(number))
        axes.set_xticks(blocks, [str(count) for count in blocks])
        axes.set_xlabel("blocks with memory")
        axes.set_ylabel("perplexity of held-out text")
        axes.legend(title="tokens of context", frameon=False)
        return finish(figure, "perplexity-over-blocks", title)


@contextmanager
def _panels(variants: Sequence[Json], below: str, beside: str) -> Iterator[tuple[Any, list[tuple[Any, list[Json]]]]]:
    """Give a figure with a panel per rule, and per panel the arms to draw: attention stands in every one."""
    known = [variant for variant in variants if variant["arm"] in _LOOK]
    ceiling = [variant for variant in known if variant["arm"] == ATTENTION]
    rules = list(dict.fromkeys(variant["rule"] for variant in known if variant["arm"] in ARMS)) or [ATTENTION]
    columns = min(len(rules), 4)
    rows = -(-len(rules) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(2.6 * columns, 4.0), 2.3 * rows + 0.8), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = []
        for axes, rule in zip(grid.flat, rules, strict=False):
            axes.set_title(rule, loc="left", fontsize=9)
            panels.append((axes, [v for v in known if v["rule"] == rule and v["arm"] in ARMS] + ceiling))
        for axes in list(grid.flat)[len(rules) :]:
            axes.remove()
        figure.supxlabel(below, fontsize=9)
        figure.supylabel(beside, fontsize=9)
        yield figure, panels


def _legend(figure: Any) -> None:
    """Put one legend for all panels above them."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=4, frameon=False)


def _longest_state(variant: Json) -> int:
    return max(variant["state_bytes"].items(), key=lambda item: int(item[0]))[1]
