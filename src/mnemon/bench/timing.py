"""Timing of competitors in one process: interleaved repeats, so that a busy machine disturbs all of them alike."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch


def interleave(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str,
    warm_ups: int = 1,
    before: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Time several functions in turn, A B A B ...

    Args:
        runs: what to time, by name.
        repeats: rounds that count.
        device: where they compute; CUDA is waited for before and after every run.
        warm_ups: rounds before that do not count.
        before: told the name of what runs next, before the clock starts (to make its inputs).

    Returns:
        Seconds of every round, by name; entry i of all names belongs to the same round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(-warm_ups, repeats):
        for name, run in runs.items():
            if before is not None:
                before(name)
            gc.collect()
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise(device: str) -> None:
    """Wait until the device has done everything it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return float(low), float(median), float(high)


def paired_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Divide the times of two competitors round by round."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]
