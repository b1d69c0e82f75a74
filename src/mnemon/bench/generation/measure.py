"""Every model at every prefix, taking turns, each within its time; and the file that the results are kept in."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mnemon.bench.generation.settings import GROWING, GenerationSettings, feed_forward_width
from mnemon.bench.generation.worker import Size, Work, Worker
from mnemon.bench.run import circumstances
from mnemon.bench.timing import cpu_threads
from mnemon.errors import DataError, RunError
from mnemon.evaluation.machine import describe_machine
from mnemon.files import atomic_write_json, read_text

_SLOW = 0.05
"""A round of generation that takes more than this share of the time limit is made once."""


@dataclass(frozen=True)
class Cell:
    """One model after one prefix; where it was left out there are no numbers.

    Attributes:
        model: name of the model.
        prefix: tokens read.
        read_seconds: seconds of reading the prefix.
        seconds: seconds of every round of generation.
        state_bytes: what is carried to the next token after the prefix.
        peak_bytes: peak memory of reading and generating over the built model.
        left_out: why there are no numbers, or an empty string.
    """

    model: str
    prefix: int
    read_seconds: float = 0.0
    seconds: tuple[float, ...] = ()
    state_bytes: int = 0
    peak_bytes: int = 0
    left_out: str = ""


@dataclass(frozen=True)
class GenerationRun:
    """Settings, circumstances and results."""

    settings: GenerationSettings
    command: str
    machine: dict[str, str]
    sizes: dict[str, Size] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()

    def of(self, model: str) -> list[Cell]:
        """Return the measured cells of a model, shortest prefix first."""
        return [cell for cell in self.cells if cell.model == model and not cell.left_out]


class _Budget:
    """What a model has measured so far, and whether the next cell fits into its time."""

    def __init__(self, model: str, limit: float) -> None:
        self.grows = model in GROWING
        self.limit = limit
        self.spent = 0.0
        self.last: Cell | None = None

    @property
    def carried_on(self) -> float:
        """Seconds of reading that the next cell does not spend again."""
        return 0.0 if self.last is None or self.grows else self.last.read_seconds

    def expected(self, prefix: int) -> float:
        """Return the seconds of one more cell: reading on (or again), and one round of generation."""
        if self.last is None:
            return 0.0
        times = prefix / self.last.prefix
        if self.grows:
            return self.last.read_seconds * times**2 + min(self.last.seconds) * times
        return self.last.read_seconds * (times - 1) + min(self.last.seconds)

    def refusal(self, prefix: int) -> str:
        """Say why a cell is not begun, or nothing."""
        wanted, left = self.expected(prefix), max(0.0, self.limit - self.spent)
        if wanted <= left:
            return ""
        return f"it is expected to take {wanted:.0f} s, {left:.0f} s of this model's {self.limit:.0f} s are left"


def run_generation_benchmark(
    settings: GenerationSettings, command: str, report: Callable[[str], None]
) -> GenerationRun:
    """Measure every model after every prefix.

    Args:
        settings: what to measure.
        command: how it was asked for, for the record.
        report: told what is measured next.

    Raises:
        ConfigError: if the models cannot be made equally large.
    """
    widths = {name: feed_forward_width(name, settings) for name in settings.models}
    with cpu_threads(settings.threads):  # as many as every process has
        machine = {**describe_machine(settings.device), **circumstances()}
    with ExitStack() as stack:
        report(f"building {', '.join(settings.models)}")
        workers: dict[str, Worker] = {}
        for name, width in widths.items():
            workers[name] = Worker(name, settings, width)
            stack.callback(workers[name].close)
        sizes = {name: worker.size() for name, worker in workers.items()}
        budgets = {name: _Budget(name, settings.time_limit) for name in workers}
        failures: dict[str, str] = {}
        cells: list[Cell] = []
        for prefix in settings.prefixes:
            refused = {name: failures.get(name) or budgets[name].refusal(prefix) for name in workers}
            active = {name: worker for name, worker in workers.items() if not refused[name]}
            report(f"prefix {prefix:,}: {', '.join(active) or 'none has time left'}")
            found = _measure(active, prefix, settings, budgets)
            failures |= {name: cell.left_out for name, cell in found.items() if cell.left_out}
            cells += [found.get(name) or Cell(name, prefix, left_out=refused[name]) for name in workers]
    return GenerationRun(settings, command, machine, sizes, tuple(cells))


def _measure(
    workers: dict[str, Worker], prefix: int, settings: GenerationSettings, budgets: dict[str, _Budget]
) -> dict[str, Cell]:
    """Read with every model in turn, then generate in rounds; a model whose process dies is left out and says why."""
    reads: dict[str, Work] = {}
    rounds: dict[str, list[Work]] = {}
    dead: dict[str, Cell] = {}

    def attempt(name: str, what: Callable[[int], Work], tokens: int) -> Work | None:
        try:
            return what(tokens)
        except RunError as error:
            dead[name] = Cell(name, prefix, left_out=str(error))
            return None

    for name, worker in workers.items():
        work = attempt(name, worker.read, prefix)
        if work is not None:
            reads[name] = work
            budgets[name].spent += work.seconds - budgets[name].carried_on
    for number in range(settings.repeats):
        for name in [name for name in reads if name not in dead]:
            worker = workers[name]
            if number and rounds[name][-1].seconds > _SLOW * settings.time_limit:
                continue
            work = attempt(name, worker.generate, settings.new_tokens)
            if work is not None:
                rounds.setdefault(name, []).append(work)
                budgets[name].spent += work.seconds
    cells = dict(dead)
    for name in [name for name in reads if name not in dead]:
        made = rounds[name]
        peak = max(work.peak_bytes for work in (reads[name], *made))
        seconds = tuple(work.seconds for work in made)
        cells[name] = Cell(name, prefix, reads[name].seconds, seconds, reads[name].state_bytes, peak)
        budgets[name].last = cells[name]
    return cells


def write_results(folder: Path, run: GenerationRun) -> Path:
    """Write `results.json`."""
    return atomic_write_json(folder / "results.json", asdict(run))


def read_results(folder: Path) -> GenerationRun:
    """Read a run back.

    Raises:
        DataError: if its file is missing or not a benchmark of generation.
    """
    path = folder / "results.json"
    try:
        content = json.loads(read_text(path))
        return GenerationRun(
            GenerationSettings.from_json(content["settings"]),
            content["command"],
            content["machine"],
            {name: Size(**size) for name, size in content["sizes"].items()},
            tuple(Cell(**{**cell, "seconds": tuple(cell["seconds"])}) for cell in content["cells"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: expected the results of `mnemon bench generation`, got {error!r}; run it again"
        ) from error
