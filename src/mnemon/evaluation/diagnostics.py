"""What the memory does while it reads, by length: read mass on written content, slot similarity, gates, norms.

A separate pass over a few samples of every length, so that it costs little and disturbs no measured answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mnemon.data.encoding import evaluation_prompt
from mnemon.evaluation.controls import ModelSpec, has_memory
from mnemon.evaluation.results import Layout
from mnemon.evaluation.samples import SampleSource
from mnemon.evaluation.tables import Grid

SAMPLES = 4
"""Most samples per task and length that are looked at."""

_TOKENS = 200_000
"""Tokens per length that are read at most, as long as one sample is read: these readings are not batched."""

MEANINGS: dict[str, str] = {
    "read_on_written": "share of the read mass that falls on written content",
    "read_slots": "slots a token reads, as exp(entropy) of its read weights",
    "written_share": "share of the bank that was written, after an update",
    "slot_similarity": "mean absolute cosine between two slots; 1 = all slots alike",
    "input_gate": "mean input gate",
    "forget_gate": "mean forget gate of one block",
    "output_gate": "mean output gate",
    "bank_rms": "root mean square of the bank",
    "term_to_attention": "norm of the memory term over that of the attention branch",
}


@dataclass(frozen=True)
class MemoryReport:
    """Diagnostics of one model at one length.

    Attributes:
        means: by name (see `MEANINGS`), and as `name/blockN` for each block.
        read_shares: for each block, the share of all reads that each slot got.
    """

    label: str
    length: str
    num_samples: int
    means: Mapping[str, float]
    read_shares: Mapping[str, Sequence[float]] = field(default_factory=dict)


@torch.no_grad()
def measure_memory(
    specs: Sequence[ModelSpec], source: SampleSource, tasks: Sequence[str], lengths: Sequence[str], layout: Layout
) -> list[MemoryReport]:
    """Read a few samples of every length with every model that has a memory bank.

    Args:
        specs: the models; those without a memory bank are passed over.
        source: where the samples come from.
        tasks: task names.
        lengths: length names.
        layout: prompt layout.

    Returns:
        One report per model and length.
    """
    reports = []
    for spec in specs:
        if not has_memory(spec.model) or not hasattr(spec.model, "collect_diagnostics"):
            continue
        was_training = spec.model.training
        spec.model.eval()
        for length in lengths:
            samples = [sample for task in tasks for sample in source.cell(task, length)[:SAMPLES]]
            count = read = 0
            with spec.model.collect_diagnostics() as collected:
                for sample in samples:
                    ids = spec.tokenizer(evaluation_prompt(sample, layout), return_tensors="pt")["input_ids"]
                    if count and read + ids.shape[1] > _TOKENS:
                        break
                    spec.model(ids.to(spec.model.device), logits_to_keep=1)
                    count, read = count + 1, read + ids.shape[1]
            means = {name: float(value) for name, value in collected.means().items()}
            shares = {f"block{block}": values for block, values in collected.read_shares().items()}
            reports.append(MemoryReport(spec.label, length, count, means, shares))
        spec.model.train(was_training)
    return reports


def memory_grid(reports: Sequence[MemoryReport]) -> Grid:
    """Arrange the reports as a table, one line per model and length."""
    head = ("model", "length", *(name.replace("_", " ") for name in MEANINGS))
    lines = [
        (report.label, report.length, *(f"{report.means.get(name, float('nan')):.3g}" for name in MEANINGS))
        for report in reports
    ]
    return Grid(head, tuple(lines))


def memory_notes() -> list[str]:
    """Say what the columns of `memory_grid` mean."""
    return [f"{name.replace('_', ' ')}: {meaning}" for name, meaning in MEANINGS.items()]


def report_from_dict(value: Mapping[str, Any]) -> MemoryReport:
    """Restore a report from what `dataclasses.asdict` made of it."""
    return MemoryReport(**value)
