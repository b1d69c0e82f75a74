"""Where the time of an evaluation goes: into the model itself, into making samples, or into all the rest."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mnemon.data.babilong import Sample
from mnemon.evaluation.samples import SampleSource


@dataclass
class ForwardClock:
    """Seconds spent in a model's forward, and forward calls, so far."""

    seconds: float = 0.0
    calls: int = 0


@contextlib.contextmanager
def forward_clock(model: Any) -> Iterator[ForwardClock]:
    """Time every forward call of a model within the context, those of `generate` included.

    Args:
        model: a module whose calls run hooks; on a GPU every call is waited for, which costs a little.

    Yields:
        The clock, which goes on until the context ends.
    """
    clock = ForwardClock()
    started: list[float] = []

    def begin(*_: Any) -> None:
        started.append(_now(model))

    def end(*_: Any) -> None:
        clock.seconds += _now(model) - started.pop()
        clock.calls += 1

    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class TimedSamples:
    """A source of samples, and how long it took to make them.

    Attributes:
        seconds: spent in `cell` so far.
    """

    source: SampleSource
    seconds: float = 0.0

    def cell(self, task: str, length: str) -> Sequence[Sample]:
        """Give the samples of one task and length."""
        started = time.perf_counter()
        try:
            return self.source.cell(task, length)
        finally:
            self.seconds += time.perf_counter() - started


def _now(model: Any) -> float:
    if getattr(model, "device", torch.device("cpu")).type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
