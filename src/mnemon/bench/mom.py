"""The benchmark of mixtures of memories: a layer beside single memories, and decoding over the context.

What a mixture costs is set against what it uses: a token goes to `top_k` memories and the shared one, so a layer may
cost as much as that many single-memory layers on the same tokens.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from mnemon.bench.models import DTYPES
from mnemon.bench.run import circumstances
from mnemon.bench.timing import cpu_threads, interleave, paired_ratios, quartiles
from mnemon.errors import DataError
from mnemon.evaluation.machine import describe_machine
from mnemon.files import atomic_write_bytes, atomic_write_json, atomic_write_text, read_text
from mnemon.layers.linear_memory import LinearMemory
from mnemon.layers.mixture_of_memories import MixtureOfMemories
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.modeling_mom import MoMForCausalLM
from mnemon.models.state import MemoryCache

PARTS = ("layer", "decode")
_READ_AT_ONCE = 4096
_VOCABULARY = 512
_LAYERS = 4


@dataclass(frozen=True)
class MoMSettings:
    """What to measure.

    Attributes:
        parts: which of `PARTS`.
        rules: update rules.
        hidden_size: model width D.
        num_heads: heads H.
        head_dim: width of keys and values per head.
        num_memories, top_k, shared_memory: the mixture.
        tokens: tokens T of a sequence in the layer's forward and backward pass.
        batch_sizes: sequences B of the layer's passes.
        contexts: tokens read before decoding, rising.
        new_tokens: tokens per round of decoding.
        repeats: rounds that count.
        device, dtype, threads: where and how.
    """

    parts: tuple[str, ...]
    rules: tuple[str, ...]
    hidden_size: int = 256
    num_heads: int = 4
    head_dim: int = 64
    num_memories: int = 4
    top_k: int = 2
    shared_memory: bool = True
    tokens: int = 2048
    batch_sizes: tuple[int, ...] = (1, 4)
    contexts: tuple[int, ...] = (1024, 16384, 131072)
    new_tokens: int = 64
    repeats: int = 7
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    @property
    def active(self) -> int:
        """Memories that a token goes to."""
        return self.top_k + int(self.shared_memory)


@dataclass(frozen=True)
class LayerRow:
    """Seconds of forward and backward: one memory, as many layers as are active in one graph, the mixture."""

    rule: str
    batch_size: int
    single: list[float]
    together: list[float]
    mixture: list[float]


@dataclass(frozen=True)
class DecodeRow:
    """Seconds per new token of a model, and the bytes of its state, after so many tokens."""

    rule: str
    model: str
    context: int
    seconds: list[float]
    state_bytes: int


@dataclass(frozen=True)
class MoMRun:
    """Settings, circumstances and results."""

    settings: MoMSettings
    command: str
    machine: dict[str, str]
    layers: list[LayerRow] = field(default_factory=list)
    decoding: list[DecodeRow] = field(default_factory=list)


def run_mom_benchmark(settings: MoMSettings, command: str, report: Callable[[str], None]) -> MoMRun:
    """Measure everything the settings ask for.

    Args:
        settings: what to measure.
        command: how it was asked for, for the record.
        report: told what is measured next.
    """
    layers: list[LayerRow] = []
    decoding: list[DecodeRow] = []
    with cpu_threads(settings.threads):
        machine = {**describe_machine(settings.device), **circumstances()}
        for rule in settings.rules:
            if "layer" in settings.parts:
                for batch_size in settings.batch_sizes:
                    report(f"{rule}: forward and backward of {batch_size} x {settings.tokens} tokens")
                    layers.append(measure_layer(rule, batch_size, settings))
            if "decode" in settings.parts:
                report(f"{rule}: decoding after {', '.join(f'{context:,}' for context in settings.contexts)} tokens")
                decoding += measure_decoding(rule, settings)
    return MoMRun(settings, command, machine, layers, decoding)


def measure_layer(rule: str, batch_size: int, settings: MoMSettings) -> LayerRow:
    """Time forward and backward of a single memory, of several in one graph, and of a mixture."""
    torch.manual_seed(0)
    sizes = (settings.hidden_size, rule, settings.num_heads, settings.head_dim)
    several = nn.ModuleList(LinearMemory(*sizes) for _ in range(settings.active))
    mixture = MixtureOfMemories(*sizes, settings.num_memories, settings.top_k, settings.shared_memory)
    place, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    for module in (several, mixture):
        module.to(place, dtype)
    x = torch.randn(batch_size, settings.tokens, settings.hidden_size, device=place, dtype=dtype, requires_grad=True)

    def backward(y: Tensor) -> None:
        y.float().square().mean().backward()
        for parameter in (*several.parameters(), *mixture.parameters(), x):
            parameter.grad = None

    runs: dict[str, Callable[[], None]] = {
        "single": lambda: backward(several[0](x)[0]),
        "together": lambda: backward(torch.stack([layer(x)[0] for layer in several]).sum(dim=0)),
        "mixture": lambda: backward(mixture(x)[0]),
    }
    seconds = interleave(runs, settings.repeats, settings.device, warm_ups=2)
    return LayerRow(rule, batch_size, seconds["single"], seconds["together"], seconds["mixture"])


@torch.inference_mode()
def measure_decoding(rule: str, settings: MoMSettings) -> list[DecodeRow]:
    """Time new tokens of a model with single memories and of one with mixtures, after contexts of every length."""
    models = {name: _model(rule, layer_type, settings) for name, layer_type in _MODELS.items()}
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(_VOCABULARY, (1, max(settings.contexts)), generator=generator).to(settings.device)
    caches: dict[tuple[str, int], MemoryCache] = {}
    sizes: dict[tuple[str, int], int] = {}
    for name, model in models.items():
        cache = None
        read = 0
        for context in settings.contexts:
            while read < context:
                end = min(context, read + _READ_AT_ONCE)
                cache = model(text[:, read:end], past_key_values=cache, logits_to_keep=1).past_key_values
                read = end
            assert cache is not None
            assert cache.state is not None
            caches[name, context] = MemoryCache(cache.state.branch())
            sizes[name, context] = cache.state.num_bytes()
    runs = {f"{name}/{context}": _decoder(models[name], caches[name, context], settings) for name, context in caches}
    seconds = interleave(runs, settings.repeats, settings.device)
    return [
        DecodeRow(
            rule, name, context, [t / settings.new_tokens for t in seconds[f"{name}/{context}"]], sizes[name, context]
        )
        for name, context in caches
    ]


_MODELS = {"single": "memory", "mixture": "mom"}


def _model(rule: str, layer_type: str, settings: MoMSettings) -> MoMForCausalLM:
    torch.manual_seed(0)
    base = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=_LAYERS,
        num_attention_heads=settings.num_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = MoMConfig(
        base_config=base,
        rule=rule,
        num_memories=settings.num_memories,
        top_k=settings.top_k,
        shared_memory=settings.shared_memory,
        num_heads=settings.num_heads,
        head_dim=settings.head_dim,
        layer_types=[layer_type] * _LAYERS,
    )
    model = MoMForCausalLM(config).eval()
    nn.Module.to(model, torch.device(settings.device), DTYPES[settings.dtype])
    return model


def _decoder(model: MoMForCausalLM, cache: MemoryCache, settings: MoMSettings) -> Callable[[], None]:
    token = torch.zeros(1, 1, dtype=torch.int64, device=settings.device)
    assert cache.state is not None
    start = cache.state

    def run() -> None:
        running = MemoryCache(start)
        with torch.inference_mode():
            for _ in range(settings.new_tokens):
                model(token, past_key_values=running)

    return run


def layer_ratio(row: LayerRow, active: int, against: str) -> tuple[float, float, float]:
    """Return quartiles of the mixture's time over that of the active number of single memories.

    Args:
        row: times.
        active: memories that a token goes to.
        against: "sum" for that many times one layer alone, "together" for as many layers in one graph.
    """
    below = [active * one for one in row.single] if against == "sum" else row.together
    return quartiles(paired_ratios(row.mixture, below))


def markdown(run: MoMRun, figure: str | None) -> str:
    """Write the page of a run."""
    settings = run.settings
    shared = " and a shared one" if settings.shared_memory else ""
    lines = [
        "# Cost of a mixture of memories",
        "",
        "Written by `mnemon bench mom`; do not edit.",
        "",
        f"A mixture of {settings.num_memories} memories of which a token goes to {settings.top_k}{shared}, against "
        f"single memories: width {settings.hidden_size}, {settings.num_heads} heads of {settings.head_dim}, "
        f"{settings.dtype}, {settings.device}, {settings.threads} thread(s). Medians of {settings.repeats} rounds in "
        "which all take turns, quartiles in brackets.",
        "",
    ]
    if run.layers:
        lines += _layer_table(run)
    if run.decoding:
        lines += _decode_table(run)
    if figure is not None:
        lines += [f"![time per new token over the context]({figure})", ""]
    facts = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    return "\n".join([*lines, f"Command: `{run.command}`. Machine: {facts}.", ""])


def _layer_table(run: MoMRun) -> list[str]:
    active = run.settings.active
    lines = [
        f"**Forward and backward of one layer, {run.settings.tokens:,} tokens per sequence** (to reach: at most 1.0 "
        f"times {active} single-memory layers on the same tokens)",
        "",
        f"| rule | sequences | single, ms | mixture, ms | mixture / {active} x single | "
        f"mixture / {active} layers in one graph |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in run.layers:
        ratios = [_spread(layer_ratio(row, active, against)) for against in ("sum", "together")]
        single, mixture = (1e3 * quartiles(values)[1] for values in (row.single, row.mixture))
        lines.append(f"| {row.rule} | {row.batch_size} | {single:.1f} | {mixture:.1f} | {ratios[0]} | {ratios[1]} |")
    return [*lines, ""]


def _decode_table(run: MoMRun) -> list[str]:
    active = run.settings.active
    lines = [
        f"**Decoding, one sequence, a model of {_LAYERS} blocks** (to reach: the same time at every context within "
        f"15 %, at most 1.3 times {active} x single, a state that does not grow)",
        "",
        f"| rule | context | single, ms per token | mixture, ms per token | mixture / {active} x single | "
        "mixture against the shortest context | state of the mixture, KiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rule in run.settings.rules:
        rows = {(row.model, row.context): row for row in run.decoding if row.rule == rule}
        first = rows["mixture", run.settings.contexts[0]]
        for context in run.settings.contexts:
            single, mixture = rows["single", context], rows["mixture", context]
            middle = [1e3 * quartiles(row.seconds)[1] for row in (single, mixture)]
            ratio = quartiles(paired_ratios(mixture.seconds, [active * second for second in single.seconds]))
            drift = quartiles(paired_ratios(mixture.seconds, first.seconds))
            lines.append(
                f"| {rule} | {context:,} | {middle[0]:.2f} | {middle[1]:.2f} | {_spread(ratio)} | {_spread(drift)} | "
                f"{mixture.state_bytes / 1024:.0f} |"
            )
    return [*lines, ""]


def _spread(values: tuple[float, float, float]) -> str:
    low, middle, high = values
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def chart(run: MoMRun) -> bytes:
    """Draw the time per new token over the context as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    for number, rule in enumerate(run.settings.rules):
        for name, style in (("single", ":"), ("mixture", "-")):
            rows = [row for row in run.decoding if (row.rule, row.model) == (rule, name)]
            times = [1e3 * quartiles(row.seconds)[1] for row in rows]
            axes.plot(
                [row.context for row in rows], times, style, marker="o", color=colours[number % len(colours)],
                label=f"{rule}, {name}",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens read before")
    axes.set_ylabel("ms per new token")
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def read_results(folder: Path) -> MoMRun:
    """Read a run back.

    Raises:
        DataError: if its file is missing or not a benchmark of mixtures.
    """
    path = folder / "results.json"
    try:
        content: Mapping[str, Any] = json.loads(read_text(path))
        raw: dict[str, Any] = content["settings"]
        settings = MoMSettings(**{key: _as_tuple(value) for key, value in raw.items()})
        layers = [LayerRow(**row) for row in content["layers"]]
        decoding = [DecodeRow(**row) for row in content["decoding"]]
        return MoMRun(settings, content["command"], content["machine"], layers, decoding)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected the results of `mnemon bench mom`, got {error!r}; run it again") from error


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def write(folder: Path, run: MoMRun) -> None:
    """Write results.json, table.md and decode.png."""
    atomic_write_json(folder / "results.json", asdict(run))
    write_page(folder / "table.md", run, "decode.png")


def write_page(path: Path, run: MoMRun, figure: str) -> Path:
    """Write the page of a run, and beside it the figure that it shows."""
    if run.decoding:
        atomic_write_bytes(path.parent / figure, chart(run))
    return atomic_write_text(path, markdown(run, figure if run.decoding else None))
