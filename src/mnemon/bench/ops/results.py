"""Results of the benchmark of update rules, and the file they are kept in."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mnemon.bench.ops.settings import OpsSettings
from mnemon.bench.timing import quartiles
from mnemon.errors import DataError
from mnemon.files import atomic_write_json, read_text


@dataclass(frozen=True)
class PassRow:
    """One form of a rule, or one competitor, over one sequence length.

    Attributes:
        rule: the rule.
        what: "forward", or "backward" for forward and backward.
        name: "recurrent", "chunkwise", "fla", "fla kernel" (called without our adapter) or "transformers".
        tokens: tokens of one run, batch times length.
        length: length T of the sequences.
        seconds: of every round; empty where it was left out.
        skipped: why it was left out, or an empty string.
    """

    rule: str
    what: str
    name: str
    tokens: int
    length: int
    seconds: list[float]
    skipped: str = ""

    @property
    def speed(self) -> float:
        """Tokens per second, from the median."""
        return self.tokens / quartiles(self.seconds)[1]


@dataclass(frozen=True)
class StepRow:
    """One token for many sequences at once, beside a plain copy of their state.

    Attributes:
        rule: the rule.
        sequences: sequences, of one token each.
        state_bytes: size of their state.
        step_seconds: of every round.
        clone_seconds: of `state.clone()` in the same rounds.
    """

    rule: str
    sequences: int
    state_bytes: int
    step_seconds: list[float]
    clone_seconds: list[float]


@dataclass(frozen=True)
class Agreement:
    """Whether a competitor computed what the chunkwise form computes.

    Attributes:
        rule: the rule.
        name: the competitor.
        what: "output", "state" or "gradient of ...".
        length: length T.
        distance: root mean square of the difference over that of the chunkwise form's result.
        tolerance: largest distance that counts as equal.
    """

    rule: str
    name: str
    what: str
    length: int
    distance: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the two are equal within the tolerance (a distance that is not a number is not)."""
        return self.distance <= self.tolerance


@dataclass(frozen=True)
class OpsRun:
    """Settings, circumstances and results.

    Attributes:
        settings, command, machine: for the record.
        passes, steps, agreements: what was measured.
        refused: rules that break the contract, with the check that failed.
    """

    settings: OpsSettings
    command: str
    machine: dict[str, str]
    passes: list[PassRow]
    steps: list[StepRow]
    agreements: list[Agreement]
    refused: dict[str, str]

    def find(self, rule: str, what: str, name: str, length: int) -> PassRow | None:
        """Return a measurement that was made, or None."""
        wanted = (rule, what, name, length)
        rows = (row for row in self.passes if (row.rule, row.what, row.name, row.length) == wanted and row.seconds)
        return next(rows, None)

    def faults(self) -> list[str]:
        """Say in one sentence each which rules were refused and which competitors disagree."""
        refused = [f"{rule} breaks the contract ({reason})" for rule, reason in self.refused.items()]
        return refused + [
            f"{row.rule}, {row.name} at {row.length} tokens: {row.what} differs from chunkwise by {row.distance:.1e}, "
            f"at most {row.tolerance:.0e}"
            for row in self.agreements
            if not row.holds
        ]


def write_results(folder: Path, run: OpsRun) -> Path:
    """Write `results.json`."""
    return atomic_write_json(folder / "results.json", asdict(run))


def read_results(folder: Path) -> OpsRun:
    """Read `results.json` of a benchmark of update rules.

    Raises:
        DataError: if it is missing or of another kind.
    """
    path = folder / "results.json"
    try:
        content = json.loads(read_text(path))
        lists = {name: tuple(content["settings"][name]) for name in ("parts", "rules", "lengths")}
        return OpsRun(
            OpsSettings(**{**content["settings"], **lists}),
            content["command"],
            content["machine"],
            [PassRow(**row) for row in content["passes"]],
            [StepRow(**row) for row in content["steps"]],
            [Agreement(**row) for row in content["agreements"]],
            content["refused"],
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected the results of `mnemon bench ops`, got {error!r}; run it again") from error
