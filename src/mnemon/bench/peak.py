"""Peak memory of one piece of work, measured in a fresh process so that nothing earlier hides in the allocator.

On a CPU it is the peak resident set minus the resident set after the model was built, both without pages of files:
those of libraries come and go while a process waits. On CUDA it is the allocator's own peak minus what it held then.
`python -m mnemon.bench.peak JSON` is the process; it prints one JSON object.
"""

import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mnemon.bench.cost import MemoryShape, ModelShape
from mnemon.errors import RunError

# Freed blocks go back to the system at once, so that the resident set is what is in use and not what once was.
_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Probe:
    """One piece of work to measure.

    Attributes:
        what: "train", "train+adamw" or "infer" (prefill and a few decoding steps).
        memory: the memory; None = the plain model.
        tokens: tokens per sequence.
    """

    what: str
    shape: ModelShape
    memory: MemoryShape | None
    tokens: int
    batch_size: int
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Peak:
    """What was found: peak bytes over the built model, and bytes of its parameters."""

    peak_bytes: int
    parameter_bytes: int


def measure_peak(probe: Probe) -> Peak:
    """Run a probe in a fresh process.

    Raises:
        RunError: if that process fails; the last line of its error is quoted.
    """
    done = subprocess.run(
        [sys.executable, "-m", "mnemon.bench.peak", json.dumps(asdict(probe))],
        env=process_environment(probe.threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"the memory probe failed ({reason}); use smaller sizes or a machine with more memory")
    return Peak(**json.loads(done.stdout.strip().splitlines()[-1]))


def process_environment(threads: int) -> dict[str, str]:
    """Return the environment of a fresh process that measures: this package, its threads, a thrifty allocator."""
    environment = {**os.environ, **_ALLOCATOR, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    search = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [search, os.environ.get("PYTHONPATH")]))
    return environment


def run_probe(probe: Probe) -> Peak:
    """Do the work of a probe in this process and return the peak over the built model."""
    import torch

    from mnemon.bench.models import build_model, random_tokens

    torch.set_num_threads(probe.threads)
    model = build_model(probe.shape, probe.memory, probe.device, probe.dtype)
    ids = random_tokens(probe.shape, probe.batch_size, probe.tokens, probe.device)
    if probe.what == "infer":
        from mnemon.bench.inference import Reader

        reader = Reader(model.eval())

        def work() -> object:
            return reader.decode(reader.prefill(ids), 4)

    else:
        from mnemon.bench.train_step import TrainStep

        work = TrainStep(model, ids, probe.what == "train+adamw")
    gc.collect()
    peak = PeakMeter(probe.device).peak_of(work)
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Peak(peak, parameters)


class PeakMeter:
    """Measures peak memory against what this process held when the meter was made.

    Args:
        device: on CUDA the allocator's numbers count, otherwise the resident set.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = self._held()

    def peak_of(self, work: Callable[[], object]) -> int:
        """Do the work and return the highest memory during it, in bytes over the meter's start."""
        if self._on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            work()
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        _give_back_freed_memory()
        if _status("VmRSS") is not None:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the recorded peak starts again from here
        work()
        peak = _status("VmHWM")
        return (_peak_ever() if peak is None else peak - _of_files()) - self._before

    @property
    def _on_cuda(self) -> bool:
        return self._device.startswith("cuda")

    def _held(self) -> int:
        if self._on_cuda:
            import torch

            return torch.cuda.memory_allocated(self._device)
        _give_back_freed_memory()
        return resident_bytes() - _of_files()


def resident_bytes() -> int:
    """Return the resident set of this process; on systems that do not tell, its peak."""
    now = _status("VmRSS")
    return _peak_ever() if now is None else now


def _of_files() -> int:
    """Return the bytes of files, such as libraries, in the resident set; 0 on systems that do not tell."""
    return sum(_status(field) or 0 for field in ("RssFile", "RssShmem"))


def _give_back_freed_memory() -> None:
    """Let glibc return every free page: work would otherwise find its first pages where something was freed before."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _peak_ever() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int | None:
    """Read a size of this process from Linux in bytes; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    return sizes[0] if sizes else None


def _main(argument: str) -> None:
    fields = json.loads(argument)
    memory = fields.pop("memory")
    probe = Probe(
        **{
            **fields,
            "shape": ModelShape(**fields["shape"]),
            "memory": None if memory is None else MemoryShape(**memory),
        }
    )
    print(json.dumps(asdict(run_probe(probe))))


if __name__ == "__main__":
    _main(sys.argv[1])
