"""The benchmark of RMT and ARMT: one training step beside a plain Llama's, and what segments hand on."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from mnemon.bench.cost import ModelShape, plain_multiply_adds, visible_pairs
from mnemon.bench.models import DTYPES, llama_config, random_tokens
from mnemon.bench.report import grid, spread
from mnemon.bench.run import circumstances
from mnemon.bench.timing import cpu_threads, interleave, paired_ratios, quartiles
from mnemon.bench.train_step import TrainStep
from mnemon.errors import DataError
from mnemon.evaluation.machine import describe_machine
from mnemon.files import atomic_write_json, atomic_write_text, read_text
from mnemon.models.configuration_rmt import MEMORIES, RMTConfig
from mnemon.models.modeling_rmt import RMTForCausalLM

TIME_TARGET = 1.30
"""What a training step of RMT (`memory="tokens"`) may take, in training steps of the plain model."""
_PLAIN = "plain"


@dataclass(frozen=True)
class RMTSettings:
    """What to measure.

    Attributes:
        shape: the Llama.
        tokens: tokens T of a training sequence.
        batch_sizes: sequences B.
        segment_length: tokens C per segment.
        num_memory_tokens: memory tokens m.
        repeats: rounds that count.
        device, dtype, threads: where and how.
    """

    shape: ModelShape
    tokens: int = 1024
    batch_sizes: tuple[int, ...] = (1, 4)
    segment_length: int = 256
    num_memory_tokens: int = 16
    repeats: int = 7
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1


@dataclass(frozen=True)
class RMTRow:
    """One kind of memory against the plain model.

    Attributes:
        memory: kind of memory, see `RMTConfig`.
        plain_seconds: seconds of every round of the plain model.
        seconds: the same rounds with the memory.
        arithmetic: ratio of the multiply-adds of the decoder, memory tokens included; an associative memory's own
            are not counted.
        state_bytes: what a row carries between two segments.
    """

    memory: str
    batch_size: int
    plain_seconds: list[float]
    seconds: list[float]
    arithmetic: float
    state_bytes: int

    @property
    def ratio(self) -> float:
        """Fastest round over the plain model's fastest; the steadier number on a busy machine."""
        return min(self.seconds) / min(self.plain_seconds)


@dataclass(frozen=True)
class RMTRun:
    """Settings, circumstances and results."""

    settings: RMTSettings
    command: str
    machine: dict[str, str]
    rows: list[RMTRow] = field(default_factory=list)


def run_rmt_benchmark(settings: RMTSettings, command: str, report: Callable[[str], None]) -> RMTRun:
    """Time the training step of every kind of memory and of the plain model, taking turns in one process.

    Args:
        settings: what to measure.
        command: how it was asked for, for the record.
        report: told what is measured next.
    """
    with cpu_threads(settings.threads):
        machine = {**describe_machine(settings.device), **circumstances()}
        configs = {memory: _config(settings, memory) for memory in MEMORIES}
        with_memory = {memory: RMTForCausalLM(config) for memory, config in configs.items()}
        models: dict[str, PreTrainedModel] = {_PLAIN: LlamaForCausalLM(llama_config(settings.shape)), **with_memory}
        for model in models.values():
            nn.Module.to(model.train(), torch.device(settings.device), DTYPES[settings.dtype])
        rows = []
        for batch_size in settings.batch_sizes:
            report(f"training step of {batch_size} x {settings.tokens} tokens")
            ids = random_tokens(settings.shape, batch_size, settings.tokens, settings.device)
            steps = {name: TrainStep(model, ids, optimiser=False) for name, model in models.items()}
            seconds = interleave(steps, settings.repeats, settings.device)
            rows += [
                RMTRow(
                    memory,
                    batch_size,
                    seconds[_PLAIN],
                    seconds[memory],
                    arithmetic_ratio(settings, config),
                    with_memory[memory].initial_state(1).num_bytes(),
                )
                for memory, config in configs.items()
            ]
    return RMTRun(settings, command, machine, rows)


def arithmetic_ratio(settings: RMTSettings, config: RMTConfig) -> float:
    """Divide the multiply-adds of the decoder with memory tokens by those of the plain model over the same tokens.

    The head sees no memory token, and nothing is written behind the last segment.
    """
    shape, tokens, length = settings.shape, settings.tokens, config.segment_length
    plain = plain_multiply_adds(shape, tokens)
    head = shape.hidden_size * shape.vocab_size
    group, in_front = config.num_memory_tokens, 0 if config.is_associative else config.num_memory_tokens
    texts = [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)
    frames = [in_front + text + group for text in texts]
    frames[-1] -= group
    per_column = (plain - tokens * head) // shape.num_layers - 2 * shape.hidden_size * visible_pairs(tokens)
    attention = sum(2 * shape.hidden_size * visible_pairs(frame) for frame in frames)
    blocks = shape.num_layers * (sum(frames) * per_column // tokens + attention)
    return (blocks + tokens * head) / plain


def _config(settings: RMTSettings, memory: str) -> RMTConfig:
    return RMTConfig(
        base_config=llama_config(settings.shape),
        memory=memory,
        num_memory_tokens=settings.num_memory_tokens,
        segment_length=settings.segment_length,
    )


def markdown(run: RMTRun) -> str:
    """Write the page of a run."""
    settings, shape = run.settings, run.settings.shape
    body = []
    for row in run.rows:
        low, middle, high = quartiles(paired_ratios(row.seconds, row.plain_seconds))
        times = (spread(row.plain_seconds), spread(row.seconds), f"{middle:.2f} [{low:.2f}–{high:.2f}]")
        body.append(
            (row.memory, row.batch_size, *times, f"{row.ratio:.2f}", f"{row.arithmetic:.2f}", row.state_bytes / 1024)
        )
    header = (
        "memory", "batch", "plain, ms", "with memory, ms", "ratio [quartiles]", "ratio of minima", "arithmetic",
        "state, KiB",
    )  # fmt: skip
    verdicts = [
        f"- tokens, batch {row.batch_size}: {row.ratio:.2f}x, target at most {TIME_TARGET:.2f}x: "
        f"{'pass' if row.ratio <= TIME_TARGET else 'FAIL'}\n"
        for row in run.rows
        if row.memory == "tokens"
    ]
    parts = [
        "# Cost of memory tokens: RMT and ARMT against a plain Llama\n",
        "Written by `mnemon bench rmt`; do not edit.\n",
        f"Llama of width {shape.hidden_size}, {shape.num_layers} blocks, {shape.num_heads} heads, MLP "
        f"{shape.intermediate_size}, vocabulary {shape.vocab_size}; {settings.dtype} on {settings.device}, threads: "
        f"{settings.threads}. Forward and backward over {settings.tokens} tokens per sequence, segments of "
        f"{settings.segment_length} tokens, {settings.num_memory_tokens} memory tokens; all models in one process, "
        f"{settings.repeats} interleaved rounds.\n",
        grid(header, body),
        "Times: median (minimum; quartiles). Arithmetic: ratio of the decoder's multiply-adds, without what an "
        "associative memory computes. State: what a row carries between two segments.\n",
        "Targets (ratio of minima):\n",
        "".join(verdicts),
    ]
    facts = "".join(f"- {name}: {value}\n" for name, value in run.machine.items())
    return "\n".join([*parts, "## Made with\n", f"`{run.command}`\n", facts])


def write(folder: Path, run: RMTRun) -> None:
    """Write results.json and table.md."""
    atomic_write_json(folder / "results.json", asdict(run))
    atomic_write_text(folder / "table.md", markdown(run))


def read_results(folder: Path) -> RMTRun:
    """Read a run back.

    Raises:
        DataError: if its file is missing or not a benchmark of RMT.
    """
    path = folder / "results.json"
    try:
        content = json.loads(read_text(path))
        raw = content["settings"]
        shape, sizes = ModelShape(**raw["shape"]), tuple(raw["batch_sizes"])
        settings = RMTSettings(**{**raw, "shape": shape, "batch_sizes": sizes})
        return RMTRun(settings, content["command"], content["machine"], [RMTRow(**row) for row in content["rows"]])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected the results of `mnemon bench rmt`, got {error!r}; run it again") from error
