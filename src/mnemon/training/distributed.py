"""Several processes of one run: how they start, agree, fail together, and which engine moves their gradients.

`torchrun` starts the processes; `joined_processes` connects them. What all of them must know (loss, answers, clock, a
wish to stop) travels as a few numbers per step over a CPU connection, beside the engine's own traffic. The rows of a
batch are dealt out by `mnemon.training.batches.share_rows`, gradients are reduced by Hugging Face's Trainer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from mnemon.errors import BackendUnavailable, ConfigError, PeerError
from mnemon.files import RUN_MARKER
from mnemon.training.recipe import OptimisationSection, Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process, from 0; process 0 alone writes files and prints.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, element by element, the same bits on every process.

        Args:
            values: as many numbers as on every other process; added in float64.

        Raises:
            PeerError: another process is gone.
        """
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with explain_lost_peer():
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return what every process passed (any picklable value), in the order of their ranks."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            with explain_lost_peer():
                dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let every process leave the block, or none: wait for the slowest, and stop all where one failed.

        A block in which processes wait for each other is safe only as long as none fails inside.

        Raises:
            PeerError: another process failed (the first one that did raises its own error).
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather("" if failure is None else f"process {self.rank}: {failure or type(failure).__name__}")
        first = next((rank for rank, message in enumerate(failures) if message), None)
        if first is None:
            return
        if failure is not None and first == self.rank:
            raise failure
        raise PeerError(f"stopped because of {failures[first]}")

    def from_main(self, action: Callable[[], T]) -> T:
        """Run `action` on process 0 alone and return its result on every process; if it fails, all stop.

        Raises:
            PeerError: `action` failed on process 0, which raises the error itself.
        """
        result: Any = None
        with self.together():
            if self.is_main:
                result = action()
        return self.gather(result)[0]

    def stop_all(self, error: Exception) -> Exception:
        """Return what this process raises for a fault that all have noticed: the fault itself on process 0 only."""
        return error if self.is_main else PeerError(f"stopped because of process 0: {error}")


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Connect the processes that `torchrun` (or `accelerate launch`) started; alone, do nothing.

    A connection that stands already is used and left as it is.

    Raises:
        ConfigError: WORLD_SIZE promises processes that cannot be reached.
    """
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {count}, but the processes cannot be connected ({str(error).splitlines()[0]}); start "
            "them with torchrun"
        ) from None
    yield Processes(dist.get_rank(), count)
    # Reached only if all went well: after a failure the others may be waiting in a call that never returns.
    dist.destroy_process_group()


def check_shared_folder(folder: Path, processes: Processes) -> None:
    """Make sure that every process sees the run's folder, which process 0 has just made.

    Raises:
        ConfigError: a process, on another machine, does not.
    """
    with processes.together():
        if not (folder / RUN_MARKER).is_file():
            raise ConfigError(
                f"process {processes.rank} does not see the run's folder {folder}; choose an --output on a file system "
                "that all machines share"
            )


def check_sharding(recipe: Recipe, uses_cuda: bool, processes: Processes) -> None:
    """Refuse `sharding: fsdp` where it cannot be had, before anything is built.

    Raises:
        ConfigError: there is one process, or the base is frozen.
        BackendUnavailable: the run is on CPUs, where accelerate would quietly use DDP instead.
    """
    if recipe.optimisation.sharding == "none":
        return
    if recipe.model.freeze_base:
        raise ConfigError(
            "optimisation.sharding: fsdp cannot be combined with model.freeze_base, whose result is a memory alone; "
            "set it to none"
        )
    if processes.count == 1:
        raise ConfigError(
            "optimisation.sharding is fsdp, but there is one process to shard over; start several with torchrun "
            "--nproc_per_node=N, or set it to none"
        )
    if not uses_cuda:
        raise BackendUnavailable(
            "optimisation.sharding is fsdp, which needs one CUDA GPU per process (on CPUs only DDP runs); set it to "
            "none"
        )


def decoder_layer_classes(model: PreTrainedModel) -> list[str]:
    """Return the class names of the decoder's blocks, the units that FSDP gathers one at a time.

    Memory banks are no units of their own: their methods are called directly, which FSDP's hooks on `forward` do not
    see. They belong to the root unit, sharded at rest, gathered once per forward pass and kept until its backward.
    """
    decoder = getattr(model, "base", model)
    known = set(getattr(decoder, "_no_split_modules", None) or [])
    return sorted(known & {type(module).__name__ for module in decoder.modules()})


def engine_in_use(distributed_type: str, model: Any) -> str:
    """Name the engine that really runs: `single process`, `ddp` or `fsdp`.

    Args:
        distributed_type: as accelerate reports it.
        model: the network as the engine has wrapped it.
    """
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "fsdp"
    if isinstance(getattr(model, "_orig_mod", model), torch.nn.parallel.DistributedDataParallel):
        return "ddp"
    return "single process" if distributed_type == "NO" else distributed_type.lower()


def check_engine(options: OptimisationSection, engine: str, processes: Processes) -> None:
    """Make sure that the engine in use is the one the recipe asked for.

    Raises:
        BackendUnavailable: it is another one.
    """
    wanted = "single process" if processes.count == 1 else "ddp" if options.sharding == "none" else "fsdp"
    # With one process, a launcher may still wrap the network, which changes nothing.
    if engine != wanted and not (processes.count == 1 and engine == "ddp"):
        raise BackendUnavailable(
            f"optimisation.sharding is {options.sharding}, which asks for the engine {wanted!r}, but accelerate runs "
            f"{engine!r}; check the launcher's settings (ACCELERATE_* variables)"
        )


@contextmanager
def explain_lost_peer() -> Iterator[None]:
    """Turn what torch raises when another process has died into one line.

    Raises:
        PeerError: the connection to another process broke.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo has no error type of its own, but names its source file.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise PeerError(f"another process of the run is gone ({str(error).splitlines()[0]})") from error
