"""Figures that a comparison of runs adds to those of an evaluation: losses, memory by number of blocks, any suite."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mnemon.evaluation.compare.curves import TrainingCurve, perplexity
from mnemon.evaluation.compare.suites import SuiteComparison
from mnemon.evaluation.plots import GRID_COLOUR, STYLE, Plot, add_legend, finish, series_style
from mnemon.evaluation.samples import slug

_MARKERS_ON_A_CURVE = 8


def plot_losses(curves: Sequence[tuple[str, TrainingCurve]]) -> Plot:
    """Draw the training loss over tokens, one style per label and a thin line per training seed."""
    return _plot_curves(curves, "training_loss", "Training loss", "loss, nats per token", lambda loss: loss)


def plot_perplexities(curves: Sequence[tuple[str, TrainingCurve]]) -> Plot:
    """Draw perplexity over tokens by the number of blocks with a memory (figure 5 of the LM2 paper)."""
    ordered = sorted(curves, key=lambda item: item[1].memory_blocks or 0)
    named = [(f"{label}: memory in {_blocks(curve)}", curve) for label, curve in ordered]
    return _plot_curves(
        named, "perplexity_by_blocks", "Perplexity by blocks with memory", "training perplexity", perplexity, log=True
    )


def plot_blocks(rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw held-out perplexity over the number of blocks with a memory, one line per length.

    Args:
        rows: rows of a perplexity run with `memory_blocks`, several for training seeds.
    """
    lengths = sorted({row["length"] for row in rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 4.6), layout="constrained")
        axes = figure.add_subplot()
        blocks = sorted({row["memory_blocks"] for row in rows})
        places = {count: place for place, count in enumerate(blocks)}
        for index, length in enumerate(lengths):
            own = [row for row in rows if row["length"] == length]
            shift = (index - (len(lengths) - 1) / 2) * 0.05
            means = [np.mean([_mean(row) for row in own if row["memory_blocks"] == count]) for count in blocks]
            style = series_style(index)
            axes.plot(np.array(list(places.values())) + shift, means, label=f"{length} tokens", markersize=7, **style)
            for row in own:
                place, value = places[row["memory_blocks"]] + shift, row["perplexity"]
                axes.vlines(place, value["low"], value["high"], color=style["color"], linewidth=1)
        axes.set_xticks(range(len(blocks)), [str(count) for count in blocks])
        axes.set_xlabel("blocks with a memory")
        axes.set_ylabel("perplexity of held-out text")
        _dress(axes)
        add_legend(figure, axes, "Perplexity by number of blocks with memory")
        return finish(figure, "perplexity_over_blocks", "Perplexity over the number of blocks with a memory")


def plot_suite(comparison: SuiteComparison) -> Plot:
    """Draw every number of a suite with its interval; lines where tasks have an order (lengths, pairs)."""
    tasks, labels = comparison.tasks, comparison.paired.labels
    is_ordered = all(task.replace("x", "").isdecimal() for task in tasks)
    unit = comparison.unit(tasks[0])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.8, 0.7 * len(tasks) + 2), 4.8), layout="constrained")
        axes = figure.add_subplot()
        for index, label in enumerate(labels):
            values = [comparison.shown(label, task) for task in tasks]
            mean = np.array([value.mean for value in values])
            errors = np.array([[v.mean - v.low for v in values], [v.high - v.mean for v in values]]).clip(min=0)
            style = series_style(index)
            if not is_ordered:
                style["linestyle"] = "none"
            place = np.arange(len(tasks)) + (index - (len(labels) - 1) / 2) * min(0.12, 0.7 / len(labels))
            axes.errorbar(
                place, mean, yerr=errors, label=label, markersize=7, linewidth=2, elinewidth=1, capsize=2.5,
                markeredgecolor="white", **style,
            )  # fmt: skip
        names = [task.replace("x", " × ") if is_ordered else task for task in tasks]
        is_crowded = sum(map(len, names)) > 70
        axes.set_xticks(
            range(len(tasks)), names, rotation=40 if is_crowded else 0, ha="right" if is_crowded else "center"
        )
        axes.set_xlabel(_AXES.get(comparison.suite, "task"))
        axes.set_ylabel("score, %" if unit == "%" else unit)
        if unit == "%":
            axes.set_ylim(0, 103)
        _dress(axes)
        add_legend(figure, axes, f"{comparison.suite}, 95 % intervals")
        return finish(figure, f"suite_{slug(comparison.suite)}", f"{comparison.suite}: every task with its interval")


_AXES = {"mqar": "length × key-value pairs", "perplexity": "context length (tokens)"}


def _plot_curves(
    curves: Sequence[tuple[str, TrainingCurve]], name: str, title: str, unit: str, value: Any, *, log: bool = False
) -> Plot:
    labels = list(dict.fromkeys(label for label, _ in curves))
    most = max(curve.tokens[-1] for _, curve in curves)
    scale, scale_name = (1e6, "millions of tokens") if most >= 2e6 else (1e3, "thousands of tokens")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for index, label in enumerate(labels):
            own = [curve for other, curve in curves if other == label]
            for number, curve in enumerate(own):
                axes.plot(
                    np.array(curve.tokens) / scale,
                    [value(loss) for loss in curve.losses],
                    label=label if number == 0 else None,
                    linewidth=1.8 if len(own) == 1 else 1.1,
                    markersize=6,
                    markevery=max(1, len(curve.tokens) // _MARKERS_ON_A_CURVE),
                    markeredgecolor="white",
                    zorder=10 - index,
                    **series_style(index),
                )
        axes.set_xlabel(f"training, {scale_name}")
        axes.set_ylabel(unit)
        axes.set_xlim(left=0)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        _dress(axes)
        add_legend(figure, axes, title)
        return finish(figure, name, f"{title} over tokens")


def _dress(axes: Any) -> None:
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.7, which="both")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")


def _blocks(curve: TrainingCurve) -> str:
    count = curve.memory_blocks or 0
    return "no block" if count == 0 else f"{count} block{'' if count == 1 else 's'}"


def _mean(row: Mapping[str, Any]) -> float:
    return float(row["perplexity"]["mean"])
