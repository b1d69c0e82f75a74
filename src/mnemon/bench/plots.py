"""Figures of a benchmark, readable by colour-blind eyes and on a grey printer: every model has a marker and a dash."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from mnemon.bench.inference import InferenceRow
from mnemon.bench.run import BenchRun
from mnemon.bench.timing import quartiles
from mnemon.bench.train_step import TrainRow

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v")
LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), "--")
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "font.sans-serif": ["DejaVu Sans"]}
_MIB = 2**20


@dataclass(frozen=True)
class Chart:
    """A figure as PNG bytes, with file name and title."""

    name: str
    title: str
    png: bytes


def all_charts(run: BenchRun) -> list[Chart]:
    """Draw every figure the results allow."""
    charts = []
    with matplotlib.rc_context(STYLE):
        if run.train:
            charts.append(_train_chart(run.train))
        if any(not row.skipped for row in run.inference):
            charts.append(_inference_chart(run.inference))
    return charts


def _train_chart(rows: Sequence[TrainRow]) -> Chart:
    """Draw time and memory ratios as bars, with the arithmetic beside the time."""
    figure = Figure(figsize=(8.0, 0.42 * len(rows) + 1.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    places = list(range(len(rows)))
    names = [f"{row.memory.name}, C {row.memory.segment_length}, batch {row.batch_size}" for row in rows]
    ratios = [row.ratios for row in rows]
    spread = [[middle - low for low, middle, _ in ratios], [high - middle for _, middle, high in ratios]]
    middles = [middle for _, middle, _ in ratios]
    time_axes.barh(places, middles, 0.6, xerr=spread, color=COLOURS[1], label="measured, with quartiles")
    arithmetic = [row.arithmetic for row in rows]
    time_axes.plot(arithmetic, places, "D", color=COLOURS[2], markeredgecolor="white", label="multiply-adds")
    memory_axes.barh(places, [row.memory_ratio for row in rows], 0.6, color=COLOURS[3], hatch="//", edgecolor="white")
    for axes, title in ((time_axes, "time, LM2 / plain"), (memory_axes, "added peak memory, LM2 / plain")):
        axes.axvline(1, color="#666666", linewidth=1)
        axes.set_xlabel(title)
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
    time_axes.set_yticks(places, names)
    time_axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False, title="Training step")
    return Chart("train.png", "Training step: time and memory of LM2 over the plain model", png(figure))


def _inference_chart(rows: Sequence[InferenceRow]) -> Chart:
    """Draw prefill, decoding and peak memory over the context length."""
    figure = Figure(figsize=(10.0, 3.6), layout="constrained")
    panels: tuple[tuple[str, Callable[[InferenceRow], float | None]], ...] = (
        ("prefill, tokens per second", lambda row: _median(row.prefill_seconds, row.context)),
        ("decode, ms per token", lambda row: _median([1 / (1000 * value) for value in row.decode_seconds], 1)),
        ("peak memory over the model, MiB", lambda row: row.peak_bytes / _MIB),
    )
    names = list(dict.fromkeys(row.model for row in rows))
    for axes, (title, value) in zip(figure.subplots(1, 3), panels, strict=True):
        for index, name in enumerate(names):
            points = [(row.context, value(row)) for row in rows if row.model == name and not row.skipped]
            found = [(context, number) for context, number in points if number]
            axes.plot(
                [context for context, _ in found],
                [number for _, number in found],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle=LINES[index % len(LINES)],
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        contexts = sorted({row.context for row in rows})
        axes.set_xticks(contexts, [short_count(context) for context in contexts])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.5g}"))
        axes.set_xlabel("context, tokens")
        axes.set_title(title, fontsize=9)
        axes.grid(color="#dddddd")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, handlelength=4)
    return Chart("inference.png", "Prefill, decoding and peak memory over the context length", png(figure))


def _median(seconds: Sequence[float], amount: float) -> float | None:
    return amount / quartiles(seconds)[1] if seconds else None


def short_count(tokens: int) -> str:
    """Write a number of tokens as an axis shows it: 4096 is 4K, 2^20 is 1M."""
    if tokens % 2**20 == 0:
        return f"{tokens // 2**20}M"
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def png(figure: Figure) -> bytes:
    """Draw a figure and return the bytes of its PNG, the same ones every time."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
