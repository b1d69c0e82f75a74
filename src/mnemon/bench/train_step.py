"""Time and added peak memory of one training step, plain against LM2."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mnemon.bench.cost import MemoryShape, arithmetic_ratio
from mnemon.bench.models import build_model, random_tokens
from mnemon.bench.peak import Probe, measure_peak
from mnemon.bench.settings import Settings
from mnemon.bench.timing import interleave, paired_ratios, quartiles

TIME_TARGETS = {"compact": 1.30, "full": 2.00}
MEMORY_TARGETS = {"compact": 1.30, "full": 1.60}
_PLAIN = "plain"


@dataclass(frozen=True)
class TrainRow:
    """One configuration against the plain model.

    Attributes:
        plain_seconds: seconds of every round of the plain model.
        lm2_seconds: the same rounds of LM2.
        arithmetic: ratio of the multiply-adds.
        plain_bytes: peak memory of a step over the built model.
        lm2_bytes: the same of LM2.
        is_default: whether the targets apply (they are set for the default segment length).
    """

    memory: MemoryShape
    tokens: int
    batch_size: int
    plain_seconds: list[float]
    lm2_seconds: list[float]
    arithmetic: float
    plain_bytes: int
    lm2_bytes: int
    is_default: bool

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Quartiles of LM2's time over the plain model's, round by round."""
        return quartiles(paired_ratios(self.lm2_seconds, self.plain_seconds))

    @property
    def ratio_of_minima(self) -> float:
        """Fastest round of LM2 over the plain model's fastest; the steadier number on a busy machine."""
        return min(self.lm2_seconds) / min(self.plain_seconds)

    @property
    def memory_ratio(self) -> float:
        """LM2's added peak memory over the plain model's."""
        return self.lm2_bytes / self.plain_bytes

    def verdicts(self) -> list[str]:
        """Compare with the targets, one sentence each; none where no target is set."""
        if not self.is_default or self.memory.name not in TIME_TARGETS:
            return []
        pairs = (
            ("time", self.ratios[1], TIME_TARGETS[self.memory.name]),
            ("added peak memory", self.memory_ratio, MEMORY_TARGETS[self.memory.name]),
        )
        return [
            f"{self.memory.name}, batch {self.batch_size}: {what} {value:.2f}x, target at most {target:.2f}x: "
            f"{'pass' if value <= target else 'FAIL'}"
            for what, value, target in pairs
        ]


def measure_training(settings: Settings, report: Callable[[str], None]) -> list[TrainRow]:
    """Measure every memory at every batch size.

    Each memory takes turns with a plain model in one process. Only the two exist meanwhile: with more models the
    allocator is in a state that no training knows.

    Args:
        settings: `memories`, `batch_sizes`, `tokens` and how to run.
        report: told what is measured next.
    """
    return [
        row
        for batch_size in settings.batch_sizes
        for row in _measure_batch_size(settings, batch_size, lambda what: report(f"training step, {what}"))
    ]


def _measure_batch_size(settings: Settings, batch_size: int, report: Callable[[str], None]) -> list[TrainRow]:
    def peak(memory: MemoryShape | None) -> int:
        report(f"batch {batch_size}: memory of {_PLAIN if memory is None else _key(memory)}")
        step = "train+adamw" if settings.optimiser else "train"
        sizes = (settings.tokens, batch_size, settings.device, settings.dtype, settings.threads)
        return measure_peak(Probe(step, settings.shape, memory, *sizes)).peak_bytes

    plain_peak = peak(None)
    rows = []
    for memory in settings.memories:
        report(f"batch {batch_size}: time of {_key(memory)}")
        seconds = _time_pair(settings, memory, batch_size)
        rows.append(
            TrainRow(
                memory,
                settings.tokens,
                batch_size,
                *seconds,
                arithmetic_ratio(settings.shape, memory, settings.tokens),
                plain_peak,
                peak(memory),
                memory.segment_length == settings.default_segment,
            )
        )
    return rows


def _time_pair(settings: Settings, memory: MemoryShape, batch_size: int) -> tuple[list[float], list[float]]:
    """Return the seconds of the plain model and of LM2, round by round."""
    ids = random_tokens(settings.shape, batch_size, settings.tokens, settings.device)
    models = (build_model(settings.shape, shape, settings.device, settings.dtype) for shape in (None, memory))
    plain, lm2 = (TrainStep(model, ids, settings.optimiser) for model in models)
    seconds = interleave({_PLAIN: plain, "lm2": lm2}, settings.repeats, settings.device)
    return seconds[_PLAIN], seconds["lm2"]


class TrainStep:
    """One training step of a model: forward, backward and, if asked for, AdamW.

    Args:
        model: what is trained.
        ids: inputs and labels, [B, T].
        optimiser: whether to step.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, optimiser: bool) -> None:
        self.model, self.ids = model, ids
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6) if optimiser else None

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.model(self.ids, labels=self.ids, use_cache=False).loss.backward()
        if self.optimiser is not None:
            self.optimiser.step()


def _key(memory: MemoryShape) -> str:
    return f"{memory.name}, C {memory.segment_length}"
