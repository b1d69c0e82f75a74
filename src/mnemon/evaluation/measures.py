"""Suites that need no generation: recall of MQAR queries and perplexity of held-out text, for several models.

Every model gives one row per slice or length, and every row says what a reader must know: parameters, tokens and seed
of the training, samples, and the interval of its number. The folder of such a run holds `results.json`, `table.md` and
`samples.jsonl`, a score per sample for paired comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnemon.data.mqar import MqarSettings
from mnemon.errors import ConfigError
from mnemon.evaluation.controls import ModelSpec, describe_model
from mnemon.evaluation.sample_scores import SAMPLES, SampleScore, digest, sample_lines
from mnemon.evaluation.tables import Grid
from mnemon.files import atomic_write_json, atomic_write_text
from mnemon.metrics.mqar import held_out_samples, queries_right, recall_row
from mnemon.metrics.perplexity import held_out_windows, perplexity_row, token_losses
from mnemon.models.parameters import count_memory_blocks

FORMAT = "mnemon-measures-1"
RESULTS, TABLE = "results.json", "table.md"

Row = dict[str, Any]
Measured = tuple[tuple[Row, ...], tuple[SampleScore, ...]]
Progress = Callable[[int], None]
"""Called with the tokens read so far."""


@dataclass(frozen=True)
class MeasuredRun:
    """Everything that a table of rows says.

    Attributes:
        suite: `mqar` or `perplexity`.
        settings: what the samples were made with.
        rows: one per model and slice or length, models outermost.
        command: the command line that made it.
        machine: processor, threads, versions.
        samples: a score per model and sample; empty in runs of earlier versions.
    """

    suite: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    command: str
    machine: Mapping[str, str]
    samples: tuple[SampleScore, ...] = ()

    def value(self) -> dict[str, Any]:
        """Return the content of `results.json`: everything but the single samples."""
        value = {"format": FORMAT, **asdict(self)}
        del value["samples"]
        return value


def recall_rows(
    specs: Sequence[ModelSpec],
    slices: Sequence[MqarSettings],
    num_samples: int,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Measured:
    """Ask every model the same MQAR queries.

    Args:
        specs: models; none needs a tokenizer.
        slices: settings of the slices.
        num_samples: samples per slice, at least 1.
        seed: of the samples.
        progress: told the tokens read so far, after every slice.

    Returns:
        Rows: per model and slice facts about the model, and `mnemon.metrics.mqar.recall_row`. Samples: the share of the
        queries of every sample answered rightly.

    Raises:
        ConfigError: a model knows fewer ids than the samples have.
    """
    for spec in specs:
        known, wanted = spec.model.config.vocab_size, max(settings.vocab_size for settings in slices)
        if known < wanted:
            raise ConfigError(f"{spec.label} knows {known} token ids, the samples have {wanted}; use another model")
    rows: list[Row] = []
    scores: list[SampleScore] = []
    read = 0
    for spec in specs:
        facts = model_facts(spec)
        for settings in slices:
            samples = held_out_samples(settings, num_samples, seed)
            right = queries_right(spec.model, samples, **spec.generate_kwargs)
            rows.append({**facts, "seed": seed, **recall_row(samples, right)})
            task = f"{settings.length}x{settings.num_pairs}"
            shares = right.mean(axis=1).tolist()
            scores += _sample_scores(spec.label, "mqar", task, shares, "share_of_queries", samples.input_ids)
            read += samples.input_ids.size
            progress(read)
    return tuple(rows), tuple(scores)


def perplexity_rows(
    specs: Sequence[ModelSpec],
    lengths: Sequence[int],
    num_samples: int,
    background: str = "stdlib",
    progress: Progress = lambda _: None,
) -> Measured:
    """Measure the perplexity of every model on the held-out part of a text.

    Every model reads the text in its own tokens, so that perplexities compare models of one tokenizer only, and bits
    per byte compare all.

    Args:
        specs: models with their tokenizers.
        lengths: block lengths in tokens, each a divisor of the longest.
        num_samples: most windows of the longest length, at least 2.
        background: a source for `mnemon.data.background.load_background`.
        progress: told the tokens read so far, after every length.

    Returns:
        Rows: per model and length facts about the model, and `mnemon.metrics.perplexity.perplexity_row`. Samples: minus
        the mean loss of every window of the longest length, in nats per token.

    Raises:
        ConfigError: a length does not divide the longest.
        DataError: the text is too short.
    """
    rows: list[Row] = []
    scores: list[SampleScore] = []
    read = 0
    for spec in specs:
        facts = model_facts(spec)
        windows = held_out_windows(background, spec.tokenizer, lengths, num_samples)
        for length in lengths:
            losses = token_losses(spec.model, windows.ids.reshape(-1, length), **spec.generate_kwargs)
            rows.append({**facts, **perplexity_row(windows, length, losses)})
            gains = (-losses.reshape(len(windows), -1).mean(axis=1)).tolist()
            scores += _sample_scores(spec.label, "perplexity", str(length), gains, "nats_per_token", windows.ids)
            read += windows.ids.size
            progress(read)
    return tuple(rows), tuple(scores)


def _sample_scores(
    label: str, suite: str, task: str, values: Sequence[float], metric: str, asked: NDArray[Any]
) -> list[SampleScore]:
    return [
        SampleScore(label, suite, task, f"{task}-{number:05d}", value, metric, digest(row.astype(np.int64).tobytes()))
        for number, (value, row) in enumerate(zip(values, asked, strict=True))
    ]


def model_facts(spec: ModelSpec) -> Row:
    """Return what every row says about its model: label, source, role, size, and what its training left behind."""
    info = describe_model(spec)
    return {
        "model": spec.label,
        "source": info.source,
        "role": info.role,
        "parameters": info.num_parameters,
        "active_parameters": info.num_active_parameters,
        "memory_parameters": info.num_memory_parameters,
        "tokens_trained": info.training.get("tokens"),
        "training_seed": info.training.get("seed"),
        "recipe": info.training.get("name"),
        "memory_blocks": count_memory_blocks(spec.model),
    }


def measures_grid(run: MeasuredRun, *, with_models: bool = True) -> Grid:
    """Arrange the rows as a table.

    Args:
        run: what was measured.
        with_models: repeat the facts about the model in every row; without them the table fits a terminal.
    """
    columns = _RECALL_COLUMNS if run.suite == "mqar" else _PERPLEXITY_COLUMNS
    if with_models:
        columns = columns | _MODEL_COLUMNS
    lines = tuple(tuple(write(row) for write in columns.values()) for row in run.rows)
    return Grid(tuple(columns), lines)


def model_lines(run: MeasuredRun) -> list[str]:
    """Say one sentence about every model: its size and its training."""
    lines = {}
    for row in run.rows:
        facts = [f"{row['model']}: {row['parameters']:,} parameters"]
        if row["active_parameters"] < row["parameters"]:
            facts.append(f"{row['active_parameters']:,} of them active for one token")
        if row["tokens_trained"] is not None:
            facts.append(f"trained on {row['tokens_trained']:,} tokens (seed {row['training_seed']})")
        lines[row["model"]] = ", ".join(facts) + "."
    return list(lines.values())


def write_measures(folder: Path, run: MeasuredRun) -> None:
    """Write `samples.jsonl`, `table.md` and `results.json`, each complete or not at all; the results last.

    Raises:
        RunError: if the disk is full or the place is not writable.
    """
    page = (
        f"**{TITLES[run.suite]}**\n\n{measures_grid(run).markdown()}\n{NOTES[run.suite]}\n\nCommand: `{run.command}`\n"
    )
    atomic_write_text(folder / SAMPLES, sample_lines(run.samples))
    atomic_write_text(folder / TABLE, page)
    atomic_write_json(folder / RESULTS, run.value())


TITLES = {"mqar": "MQAR: queries answered rightly, in percent", "perplexity": "Perplexity of held-out text"}
NOTES = {
    "mqar": "Every model is asked the same queries. 95 % Wilson intervals; a sample, not a query, is one trial.",
    "perplexity": "All lengths are measured on the same tokens, in blocks read on their own; 95 % bootstrap intervals "
    "over windows of the longest length. Perplexities compare models of one tokenizer only, bits per byte compare all.",
}


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _percent(accuracy: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * accuracy[key]:.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}–{high}]"


def _perplexity(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.2f} [{value['low']:.2f}–{value['high']:.2f}]"


_MODEL_COLUMNS: dict[str, Callable[[Row], str]] = {
    "parameters": lambda row: _count(row["parameters"]),
    "active for a token": lambda row: _count(row["active_parameters"]),
    "trained on (tokens)": lambda row: _count(row["tokens_trained"]),
    "training seed": lambda row: _count(row["training_seed"]),
}
_RECALL_COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "length × pairs": lambda row: f"{row['length']} × {row['num_pairs']}",
    "right [95 %]": lambda row: _percent(row["accuracy"]),
    "samples": lambda row: _count(row["samples"]),
}
_PERPLEXITY_COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "length": lambda row: _count(row["length"]),
    "perplexity [95 %]": lambda row: _perplexity(row["perplexity"]),
    "bits per byte": lambda row: f"{row['bits_per_byte']:.3f}",
    "samples": lambda row: _count(row["samples"]),
}
