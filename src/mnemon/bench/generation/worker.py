"""One model in a process of its own, so that its peak memory is nobody else's: reads and generates as it is told.

The process (`python -m mnemon.bench.generation.worker JSON`) answers every line of its input, {"read": 4096} or
{"generate": 1024}, with one line of JSON. Processes wait while another works, so measurements do not overlap.
"""

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from mnemon.bench.generation.settings import GROWING, GenerationSettings, build
from mnemon.bench.inference import Place, Reader, fresh_cache
from mnemon.bench.models import random_tokens
from mnemon.bench.peak import PeakMeter, process_environment
from mnemon.bench.timing import synchronise
from mnemon.errors import RunError
from mnemon.models.parameters import active_parameters

_WARM_UP = 64
_MODULE = "mnemon.bench.generation.worker"
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Size:
    """How large a built model is.

    Attributes:
        intermediate_size: width of its feed-forward layers.
        parameters: all of them.
        active: those that one token meets.
        weight_bytes: bytes of all of them.
    """

    intermediate_size: int
    parameters: int
    active: int
    weight_bytes: int


@dataclass(frozen=True)
class Work:
    """One piece of work: seconds, peak bytes over the built model, and bytes carried to the next token."""

    seconds: float
    peak_bytes: int
    state_bytes: int


class Session:
    """A model that reads a prefix and generates after it.

    A state that does not grow is carried on to the next longer prefix: its seconds are the sum of what was read piece
    by piece. A state that grows is used up by generation, as it is in use (a second copy would count as its peak), and
    every prefix is read from the beginning.

    Args:
        name: the model.
        settings: sizes and where to run.
        intermediate_size: width of its feed-forward layers.
    """

    def __init__(self, name: str, settings: GenerationSettings, intermediate_size: int) -> None:
        torch.set_num_threads(settings.threads)
        model = build(name, settings, intermediate_size)
        self.reader = Reader(model)
        self.grows = name in GROWING
        self.device = settings.device
        self.ids = random_tokens(settings.shape, 1, max(*settings.prefixes, _WARM_UP), settings.device)
        self.place: Place | None = None
        self.read_tokens, self.read_seconds, self.peak_bytes, self.state_bytes = 0, 0.0, 0, 0
        self.reader.decode(self.reader.prefill(self.ids[:, :_WARM_UP]), 2)  # loads what the first call loads
        self.size = Size(
            intermediate_size,
            sum(parameter.numel() for parameter in model.parameters()),
            active_parameters(model),
            sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        )
        gc.collect()
        self.meter = PeakMeter(settings.device)

    def read(self, tokens: int) -> Work:
        """Read the first `tokens` tokens of the text."""
        if self.grows:
            self.place, self.read_tokens, self.read_seconds, self.peak_bytes = None, 0, 0.0, 0
        start, rest = self.place, self.ids[:, self.read_tokens : tokens]
        place, seconds = self._measured(lambda: self.reader.prefill(rest, start))
        self.place, self.state_bytes = place, place.num_bytes()
        self.read_tokens, self.read_seconds = tokens, self.read_seconds + seconds
        return Work(self.read_seconds, self.peak_bytes, self.state_bytes)

    def generate(self, tokens: int) -> Work:
        """Generate after what was read; may be asked for again."""
        if self.place is None:
            self.read(self.read_tokens)
        assert self.place is not None
        cache, token = fresh_cache(self.place), self.place.next_token
        if self.grows:
            self.place = None
        _, seconds = self._measured(lambda: self.reader.advance(cache, token, tokens))
        return Work(seconds, self.peak_bytes, self.state_bytes)

    def _measured(self, work: Callable[[], _Made]) -> tuple[_Made, float]:
        made: list[_Made] = []
        seconds = 0.0

        def timed() -> None:
            nonlocal seconds
            start = time.perf_counter()
            made.append(work())
            synchronise(self.device)
            seconds = time.perf_counter() - start

        gc.collect()
        synchronise(self.device)
        self.peak_bytes = max(self.peak_bytes, self.meter.peak_of(timed))
        return made[0], seconds


class Worker:
    """A session in another process.

    Args:
        name, settings, intermediate_size: as for `Session`.
    """

    def __init__(self, name: str, settings: GenerationSettings, intermediate_size: int) -> None:
        self.name = name
        order = json.dumps([name, asdict(settings), intermediate_size])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, order],
            env=process_environment(settings.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def size(self) -> Size:
        """Wait until the model is built; must be asked for first."""
        return Size(**self._answer())

    def read(self, tokens: int) -> Work:
        """See `Session.read`.

        Raises:
            RunError: if the process has died; the last line of its error is quoted.
        """
        return self._ask({"read": tokens})

    def generate(self, tokens: int) -> Work:
        """See `Session.generate`.

        Raises:
            RunError: if the process has died; the last line of its error is quoted.
        """
        return self._ask({"generate": tokens})

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, command: dict[str, int]) -> Work:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead then: what it said last is read below
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return Work(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        raise RunError(f"the process of {self.name} ended: {self._last_words(self._process.wait())}")

    def _last_words(self, code: int) -> str:
        if code < 0:
            return f"killed by signal {-code}" + (", for want of memory perhaps" if code == -9 else "")
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"exit code {code}"


def _main(order: str) -> None:
    name, settings, intermediate_size = json.loads(order)
    session = Session(name, GenerationSettings.from_json(settings), intermediate_size)
    print(json.dumps(asdict(session.size)), flush=True)
    for line in sys.stdin:
        ((what, tokens),) = json.loads(line).items()
        work = session.read(tokens) if what == "read" else session.generate(tokens)
        print(json.dumps(asdict(work)), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
