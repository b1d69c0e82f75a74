"""The benchmark of generation as a page: models, three tables over the prefix, a figure, and what was left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from mnemon.bench.generation.measure import Cell, GenerationRun, write_results
from mnemon.bench.generation.settings import FAMILIES, GROWING, describe
from mnemon.bench.inference import PIECE
from mnemon.bench.plots import STYLE, Chart, png, short_count
from mnemon.bench.report import grid
from mnemon.bench.timing import quartiles
from mnemon.files import atomic_write_bytes, atomic_write_text

_MIB = 2**20
_FIGURE = "generation.png"
_COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")  # Okabe and Ito
_MARKERS = "osPDX*"
_GREY = "#777777"
_GREY_MARKERS = "^v<>hd"
_DASHES = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))


def write(folder: Path, run: GenerationRun) -> None:
    """Write results.json, table.md and generation.png."""
    write_results(folder, run)
    write_page(folder / "table.md", run, _FIGURE)


def write_page(path: Path, run: GenerationRun, figure: str) -> Path:
    """Write the page of a run, and beside it the figure that it shows."""
    drawn = chart(run)
    atomic_write_bytes(path.parent / figure, drawn.png)
    return atomic_write_text(path, markdown(run, drawn.title, figure))


def markdown(run: GenerationRun, title: str, figure: str) -> str:
    """Write the page of a run."""
    settings, shape = run.settings, run.settings.shape
    tokens = f"{settings.new_tokens:,}"
    parts = [
        "# Cost of generation: memories against a plain Llama\n",
        "Written by `mnemon bench generation`; do not edit.\n",
        f"{tokens} tokens are generated after a prefix: greedily, one sequence, one forward call per token. All models "
        f"have width {shape.hidden_size}, {shape.num_layers} blocks, {shape.num_heads} heads, vocabulary "
        f"{shape.vocab_size}, random weights, and as many parameters that a token meets as the plain Llama; "
        f"{settings.dtype} on {settings.device}, threads: {settings.threads}. Every model lives in a process of its "
        f"own, and they take turns. A model has {settings.time_limit:g} s for everything.\n",
        f"![{title}]({figure})\n",
        *(f"{sentence}\n" for sentence in findings(run)),
        "## Models\n",
        _models(run),
        f"## Time to generate {tokens} tokens, seconds\n",
        _table(run, lambda cell: f"{quartiles(cell.seconds)[1]:.3g}"),
        *(
            [f"Median of {settings.repeats} rounds; those that take long are made once.\n"]
            if settings.repeats > 1
            else []
        ),
        "## Time to read the prefix, seconds\n",
        _table(run, lambda cell: f"{cell.read_seconds:.3g}"),
        f"The plain model reads a prefix in one call, the others in pieces of {PIECE:,} tokens. A state that does not "
        "grow is carried on from the shorter prefix, and the seconds are the sum; one that grows is made anew.\n",
        "## Peak memory over the weights, MiB\n",
        _table(run, lambda cell: f"{cell.peak_bytes / _MIB:.1f}"),
        "Highest memory while the prefix is read and the tokens are generated, minus that of the built model: on a CPU "
        "the resident set, on CUDA what the allocator holds. It holds what is carried, activations and work space, of "
        "which a prefix shorter than a piece needs less.\n",
    ]
    left_out = [f"- {cell.model} after {cell.prefix:,} tokens: {cell.left_out}.\n" for cell in _missing(run)]
    if left_out:
        parts += ["## Left out\n", "".join(left_out)]
    facts = "".join(f"- {name}: {value}\n" for name, value in run.machine.items())
    return "\n".join([*parts, "## Made with\n", f"`{run.command}`\n", facts])


def findings(run: GenerationRun) -> list[str]:
    """Say in sentences how time and memory change from the shortest to the longest measured prefix."""
    said = []
    for name in run.settings.models:
        cells = run.of(name)
        if name in GROWING and len(cells) > 1:
            first, last = cells[0], cells[-1]
            said.append(
                f"From {first.prefix:,} to {last.prefix:,} tokens the time to generate of {name} grows "
                f"{_seconds(last) / _seconds(first):.1f} times and its peak memory "
                f"{last.peak_bytes / max(first.peak_bytes, 1):.1f} times."
            )
    constant = {name: run.of(name) for name in run.settings.models if name not in GROWING}
    constant = {name: cells for name, cells in constant.items() if len(cells) > 1}
    if constant:
        ratios = {name: _seconds(cells[-1]) / _seconds(cells[0]) for name, cells in constant.items()}
        added = {name: _added_peak(cells) / _MIB for name, cells in constant.items()}
        grown = max(added, key=lambda name: added[name])
        low, high = (pick(ratios, key=lambda name: ratios[name]) for pick in (min, max))
        same = all(len({cell.state_bytes for cell in cells}) == 1 for cells in constant.values())
        said.append(
            "Of the models with a memory of constant size the time changes between "
            f"{ratios[low]:.2f} ({low}) and {ratios[high]:.2f} times ({high}) from the shortest prefix to the longest "
            f"that was measured; peak memory grows by {added[grown]:.1f} MiB at most ({grown}), counted from the first "
            f"prefix of {2 * PIECE:,} tokens or more if there are several; the state "
            f"{'has the same size after every prefix' if same else 'does NOT have the same size after every prefix'}."
        )
    return said


def chart(run: GenerationRun) -> Chart:
    """Draw time to generate and peak memory over the prefix, both axes logarithmic."""
    title = f"Time to generate {run.settings.new_tokens:,} tokens and peak memory over the prefix"
    rules = [name for name in run.settings.models if name not in FAMILIES]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 5.0), layout="constrained")
        panels: tuple[tuple[str, Callable[[Cell], float]], ...] = (
            (f"time to generate {run.settings.new_tokens:,} tokens, s", _seconds),
            ("peak memory over the weights, MiB", lambda cell: cell.peak_bytes / _MIB),
        )
        for axes, (label, value) in zip(figure.subplots(1, 2), panels, strict=True):
            for name in run.settings.models:
                cells = [cell for cell in run.of(name) if value(cell) > 0]
                axes.plot(
                    [cell.prefix for cell in cells],
                    [value(cell) for cell in cells],
                    label=name,
                    **_line(name, rules),
                )
            _log_axes(axes, run.settings.prefixes, label)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=4, fontsize=8)
        return Chart(_FIGURE, title, png(figure))


def _line(name: str, rules: list[str]) -> dict[str, Any]:
    """Give every model a marker, the families a colour and a solid line, single memories grey dashes."""
    if name in FAMILIES:
        number = FAMILIES.index(name)
        return {"color": _COLOURS[number], "marker": _MARKERS[number], "linewidth": 2.0, "markersize": 7, "zorder": 3}
    number = rules.index(name)
    return {
        "color": _GREY,
        "marker": _GREY_MARKERS[number % len(_GREY_MARKERS)],
        "fillstyle": "full" if number < len(_GREY_MARKERS) else "none",
        "linewidth": 0.9,
        "markersize": 5,
        "linestyle": _DASHES[number % len(_DASHES)],
    }


def _log_axes(axes: Axes, prefixes: tuple[int, ...], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(prefixes, [short_count(prefix) for prefix in prefixes])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.5g}"))
    axes.set_xlabel("prefix, tokens")
    axes.set_title(label, fontsize=9)
    axes.grid(color="#dddddd")


def _models(run: GenerationRun) -> str:
    header = (
        "model", "what it is", "feed-forward", "parameters", "a token meets", "weights, MiB",
        "state after the first prefix, MiB", "after the last", "grows",
    )  # fmt: skip
    body = []
    for name in run.settings.models:
        size, cells = run.sizes[name], run.of(name)
        states = [f"{cells[at].state_bytes / _MIB:.3g}" if cells else "–" for at in (0, -1)]
        body.append(
            (
                name,
                describe(name, run.settings),
                size.intermediate_size,
                f"{size.parameters:,}",
                f"{size.active:,}",
                f"{size.weight_bytes / _MIB:.1f}",
                *states,
                "yes" if name in GROWING else "no",
            )
        )
    return grid(header, body, text_columns=2)


def _table(run: GenerationRun, write_cell: Callable[[Cell], str]) -> str:
    body = []
    for name in run.settings.models:
        cells = {cell.prefix: write_cell(cell) for cell in run.of(name)}
        body.append((name, *(cells.get(prefix, "–") for prefix in run.settings.prefixes)))
    return grid(("model", *(f"{prefix:,}" for prefix in run.settings.prefixes)), body)


def _added_peak(cells: list[Cell]) -> int:
    """Return the bytes by which the peak grows; a prefix shorter than two pieces of reading needs less work space."""
    settled = [cell for cell in cells if cell.prefix >= 2 * PIECE]
    first = settled[0] if len(settled) > 1 else cells[0]
    return cells[-1].peak_bytes - first.peak_bytes


def _missing(run: GenerationRun) -> list[Cell]:
    return [cell for cell in run.cells if cell.left_out]


def _seconds(cell: Cell) -> float:
    return quartiles(cell.seconds)[1]
