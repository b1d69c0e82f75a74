"""Timing of competitors in one process: interleaved repeats, so that a busy machine disturbs all of them alike."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

# Parameters of glibc's mallopt, with what keeps memory and what is the default.
_TRIM_THRESHOLD = (-1, 2**31 - 1, 128 * 1024)
_MOST_MAPPED = (-4, 0, 65536)


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Compute with so many threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


@contextmanager
def kept_memory() -> Iterator[str]:
    """Let the process keep the memory it frees, as the allocator of a GPU does, and say so.

    glibc gives every block above 32 MiB back to the system at once; each of its pages then costs a fault when the next
    run touches it, so that long inputs measure the system and not the sums.

    Yields:
        What the allocator does, for the record.
    """
    if platform.libc_ver()[0] != "glibc":
        yield "as the system has it"
        return
    library = ctypes.CDLL(None)
    for parameter, keeping, _ in (_TRIM_THRESHOLD, _MOST_MAPPED):
        library.mallopt(parameter, keeping)
    try:
        yield "glibc, freed memory kept"
    finally:
        for parameter, _, default in (_TRIM_THRESHOLD, _MOST_MAPPED):
            library.mallopt(parameter, default)
        library.malloc_trim(0)
