"""One very long text read in a single call: is the speed flat, is the memory flat?

The text is given to `forward` as a whole; what happens inside is observed at the first block, every so many tokens. On
a CPU the resident set of the process is watched, on CUDA what the allocator holds at its peak.
"""

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mnemon.bench.peak import resident_bytes
from mnemon.data import babilong
from mnemon.errors import ConfigError, DataError
from mnemon.files import atomic_write_bytes, atomic_write_json, atomic_write_text, read_text
from mnemon.models.modeling_lm2 import LM2ForCausalLM

SETTLED = 10_000
"""Tokens after which memory and speed are expected to be flat."""


@dataclass(frozen=True)
class Sample:
    """What was seen after so many tokens: seconds since the start, bytes in use."""

    tokens: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class StreamRun:
    """One reading.

    Attributes:
        model: name of the model.
        tokens: length of the text.
        samples: what was seen on the way.
        command, machine: for the record.
    """

    model: str
    tokens: int
    samples: tuple[Sample, ...]
    command: str
    machine: dict[str, str]

    def settled(self) -> list[Sample]:
        """Return the samples after the first ten thousand tokens."""
        return [sample for sample in self.samples if sample.tokens >= SETTLED]

    def memory_spread(self) -> tuple[float, float]:
        """Return lowest and highest memory use against the first settled sample, in MiB."""
        used = [sample.bytes for sample in self.settled()]
        return (min(used) - used[0]) / 2**20, (max(used) - used[0]) / 2**20

    def speeds(self, parts: int = 10) -> list[float]:
        """Return tokens per second over equal parts of the settled text."""
        samples = self.settled()
        edges = [samples[round(index * (len(samples) - 1) / parts)] for index in range(parts + 1)]
        return [
            (later.tokens - earlier.tokens) / (later.seconds - earlier.seconds)
            for earlier, later in pairwise(edges)
            if later.tokens > earlier.tokens
        ]


def check_length(tokens: int) -> None:
    """Refuse a text too short to say anything.

    Raises:
        ConfigError: naming the shortest.
    """
    if tokens < 4 * SETTLED:
        raise ConfigError(f"a text of {tokens} tokens is too short; give at least {4 * SETTLED}")


@torch.inference_mode()
def stream(model: LM2ForCausalLM, ids: Tensor, every: int, report: Callable[[int], None]) -> list[Sample]:
    """Read a text [1, T] in one call and return what was seen every `every` tokens.

    Args:
        model: in evaluation mode.
        ids: the text.
        every: tokens between two samples.
        report: told the tokens read, for a progress bar.

    Raises:
        ConfigError: for a text too short to say anything.
    """
    check_length(ids.shape[1])
    samples: list[Sample] = []
    read = 0
    started = time.perf_counter()

    def note() -> None:
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        samples.append(Sample(read, time.perf_counter() - started, _bytes_in_use(ids.device)))
        report(read)

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal read
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if read // every != (read + hidden.shape[1]) // every:
            note()
        read += hidden.shape[1]

    model.segmented.prepare()  # its few tokens are not part of the text
    handle = model.blocks[0].module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        model(ids, logits_to_keep=1)
        note()
    finally:
        handle.remove()
    return samples


def _bytes_in_use(device: torch.device) -> int:
    if device.type != "cuda":
        return resident_bytes()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(peak)


def markdown(run: StreamRun, figure: str) -> str:
    """Write the page of a run."""
    low, high = run.memory_spread()
    speeds = run.speeds()
    middle = sorted(speeds)[len(speeds) // 2]
    lines = [
        f"**{run.model} reads {run.tokens:,} tokens in one call of `forward`.**",
        "",
        "| after the first 10,000 tokens | |",
        "| --- | ---: |",
        f"| memory of the process, against that at 10,000 tokens | {low:+.1f} to {high:+.1f} MiB |",
        f"| tokens per second, median of ten equal parts | {middle:,.0f} |",
        f"| slowest and fastest part against the median | {100 * (min(speeds) / middle - 1):+.1f} % to "
        f"{100 * (max(speeds) / middle - 1):+.1f} % |",
        "",
        f"![memory and speed over the text]({figure})",
        "",
        f"Command: `{run.command}`. Machine: {', '.join(f'{name} {value}' for name, value in run.machine.items())}.",
        "",
    ]
    return "\n".join(lines)


def chart(run: StreamRun) -> bytes:
    """Draw memory and speed over the text as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    samples = run.settled()
    places = [sample.tokens / 1000 for sample in samples]
    upper.plot(places, [(sample.bytes - samples[0].bytes) / 2**20 for sample in samples], color="#0072B2")
    upper.axhspan(-20, 20, color="#0072B2", alpha=0.08)
    upper.set_ylabel("memory, MiB\nagainst 10k tokens")
    upper.set_ylim(-30, 30)
    lower.plot(places[1:], _local_speeds(samples), color="#D55E00")
    lower.set_ylim(0, 1.2 * max(_local_speeds(samples)))
    lower.set_ylabel("tokens per second")
    lower.set_xlabel("thousand tokens read")
    figure.suptitle(f"{run.model}: one text of {run.tokens:,} tokens in one call", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _local_speeds(samples: Sequence[Sample]) -> list[float]:
    return [
        (later.tokens - earlier.tokens) / max(later.seconds - earlier.seconds, 1e-9)
        for earlier, later in pairwise(samples)
    ]


def long_text(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int = 0) -> Tensor:
    """Return a BABILong sample as token ids [1, tokens]: prose with facts hidden in it."""
    sample = next(iter(babilong.generate("qa1", tokens, 1, tokenizer, seed=seed)))
    ids: Tensor = tokenizer(sample.input, return_tensors="pt")["input_ids"]
    return ids[:, :tokens]


def read_results(folder: Path) -> StreamRun:
    """Read a run back.

    Raises:
        DataError: if its file is missing or not a stream benchmark.
    """
    path = folder / "results.json"
    try:
        content = json.loads(read_text(path))
        samples = tuple(Sample(**sample) for sample in content.pop("samples"))
        return StreamRun(**content, samples=samples)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: expected the results of `mnemon bench stream`, got {error!r}; run it again"
        ) from error


def write(folder: Path, run: StreamRun) -> None:
    """Write results.json, table.md and stream.png."""
    atomic_write_json(folder / "results.json", asdict(run))
    atomic_write_bytes(folder / "stream.png", chart(run))
    atomic_write_text(folder / "table.md", markdown(run, "stream.png"))
