"""The results of a benchmark as Markdown: tables, verdicts on the targets, and what a reader must know."""

from collections.abc import Sequence

from mnemon.bench.inference import InferenceRow
from mnemon.bench.run import BenchRun
from mnemon.bench.timing import quartiles
from mnemon.bench.train_step import TrainRow

_MIB = 2**20
_FLOWS = {"depth": "one bank runs through all blocks", "layer": "every block keeps a bank of its own"}


def markdown(run: BenchRun, figures: Sequence[tuple[str, str]] = ()) -> str:
    """Write the page of a run.

    Args:
        run: the results.
        figures: title and file name of every figure to show.
    """
    settings, shape = run.settings, run.settings.shape
    parts = [
        "# Cost of the memory: LM2 against a plain Llama\n",
        "Written by `mnemon bench lm2`; do not edit.\n",
        f"Llama of width {shape.hidden_size}, {shape.num_layers} blocks, {shape.num_heads} heads, MLP "
        f"{shape.intermediate_size}, vocabulary {shape.vocab_size}; {settings.dtype} on {settings.device}, threads: "
        f"{settings.threads}. Both models in one process, {settings.repeats} interleaved rounds. J slots of width W, "
        f"segments of C tokens; {_FLOWS[settings.memories[0].flow]}.\n",
    ]
    parts += [f"![{title}]({name})\n" for title, name in figures]
    if run.train:
        step = "forward, backward and AdamW" if settings.optimiser else "forward and backward"
        parts += [f"## Training step\n\n{step} over {settings.tokens} tokens per sequence.\n", train_table(run.train)]
        verdicts = [sentence for row in run.train for sentence in row.verdicts()]
        parts += [f"Targets (C = {settings.default_segment}):\n", "".join(f"- {line}\n" for line in verdicts)]
    if run.inference:
        parts += ["## Reading and continuing long contexts\n", _readers(run), inference_table(run.inference)]
    facts = "".join(f"- {name}: {value}\n" for name, value in run.machine.items())
    return "\n".join([*parts, "## Made with\n", f"`{run.command}`\n", facts])


def train_table(rows: Sequence[TrainRow]) -> str:
    """Write the table of the training step."""
    header = (
        "memory", "J", "W", "C", "batch", "plain, ms", "LM2, ms", "ratio [quartiles]", "ratio of minima", "arithmetic",
        "plain, MiB", "LM2, MiB", "memory ratio",
    )  # fmt: skip
    body = []
    for row in rows:
        low, ratio, high = row.ratios
        body.append(
            (
                row.memory.name,
                row.memory.num_slots,
                row.memory.slot_dim,
                row.memory.segment_length,
                row.batch_size,
                spread(row.plain_seconds),
                spread(row.lm2_seconds),
                f"{ratio:.2f} [{low:.2f}–{high:.2f}]",
                f"{row.ratio_of_minima:.2f}",
                f"{row.arithmetic:.2f}",
                f"{row.plain_bytes / _MIB:.0f}",
                f"{row.lm2_bytes / _MIB:.0f}",
                f"{row.memory_ratio:.2f}",
            )
        )
    note = (
        "Times: median (minimum; quartiles). Ratio: median over the rounds of LM2's time over the plain model's in the "
        "same round. Arithmetic: ratio of the multiply-adds. Memory: peak of one step over the built model, each in a "
        "process of its own.\n"
    )
    return f"{grid(header, body)}\n{note}"


def inference_table(rows: Sequence[InferenceRow]) -> str:
    """Write the table of prefill and decoding."""
    header = (
        "context", "model", "prefill, s", "prefill, tokens/s", "decode, ms/token", "generate, ms/token", "state, MiB",
        "peak, MiB",
    )  # fmt: skip
    body: list[tuple[object, ...]] = []
    notes = []
    for row in rows:
        if row.skipped:
            notes.append(f"- {row.model} at {row.context:,} tokens is left out: {row.skipped}.\n")
            continue
        speed = f"{row.context / quartiles(row.prefill_seconds)[1]:,.0f}" if row.prefill_seconds else "–"
        body.append(
            (
                f"{row.context:,}",
                row.model,
                _seconds(row.prefill_seconds),
                speed,
                spread(row.decode_seconds),
                spread(row.generate_seconds),
                f"{row.state_bytes / _MIB:.1f}",
                f"{row.peak_bytes / _MIB:.0f}",
            )
        )
    return f"{grid(header, body)}\n{''.join(notes)}"


def _readers(run: BenchRun) -> str:
    described = "; ".join(
        f"{memory.name}: J {memory.num_slots}, W {memory.slot_dim}, C {memory.segment_length}, attention sees "
        f"{memory.attention_span} tokens"
        for memory in run.settings.readers
    )
    return (
        f"{described}. The plain model keeps all keys and values (`DynamicCache`) and reads a context in one call, LM2 "
        f"in pieces. Batch 1, {run.settings.new_tokens} new tokens per round: decode is a forward call per token, "
        "generate is `generate()`. Peak: memory of reading and four new tokens over the built model.\n"
    )


def spread(seconds: Sequence[float]) -> str:
    """Write times in milliseconds: median (minimum; quartiles)."""
    if not seconds:
        return "–"
    low, median, high = (1000 * value for value in quartiles(seconds))
    return f"{median:.4g} ({1000 * min(seconds):.4g}; {low:.4g}–{high:.4g})"


def _seconds(seconds: Sequence[float]) -> str:
    return f"{quartiles(seconds)[1]:.3g} (min {min(seconds):.3g}, n {len(seconds)})" if seconds else "–"


def grid(header: Sequence[str], body: Sequence[Sequence[object]], text_columns: int = 1) -> str:
    """Write a Markdown table; the first columns are text, the others are numbers."""
    marks = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (header, marks, *body))
