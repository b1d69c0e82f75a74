"""What the speed of update rules is expected to be, and whether a run shows it."""

from collections.abc import Iterator
from dataclasses import dataclass

from mnemon.bench.ops.competitors import CHUNKWISE, KERNEL
from mnemon.bench.ops.results import OpsRun
from mnemon.bench.timing import paired_ratios, quartiles

FLAT_LENGTHS, FLAT_TARGET = (4096, 65536), 0.85
SPEEDUP_LENGTH, SPEEDUP_TARGET = 2048, 10.0
"""For forward and backward together; forward alone is reported without a target."""
PEER_TARGETS = {("gated_delta_net", "backward"): {512: 1.5, 2048: 2.5, 8192: 6.0}}
"""By rule and pass, on a CPU: how many times faster than transformers the chunkwise form is, by length."""
OVERHEAD_LENGTHS, OVERHEAD_TARGET = (2048, 8192, 32768), 1.02


@dataclass(frozen=True)
class Ratio:
    """Two measurements of a rule divided, round by round.

    Attributes:
        rule: the rule.
        what: "forward" or "backward".
        label: what was divided.
        rounds: the ratio in every round.
        of_minima: the ratio of the fastest rounds, steadier on a busy machine.
        target: what it should reach, or None.
        at_most: the target is the largest good value; else the smallest.
    """

    rule: str
    what: str
    label: str
    rounds: list[float]
    of_minima: float
    target: float | None = None
    at_most: bool = False

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile."""
        return quartiles(self.rounds)

    @property
    def passed(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.target is None:
            return None
        median = self.quartiles[1]
        return median <= self.target if self.at_most else median >= self.target


def all_ratios(run: OpsRun) -> list[Ratio]:
    """Divide everything that has a target or stands beside published code, as far as it was measured."""
    found = []
    for rule in run.settings.rules:
        for what in ("forward", "backward"):
            found += [ratio for kind in (_flatness, _speedup, _peers, _overhead) for ratio in kind(run, rule, what)]
    return found


def _flatness(run: OpsRun, rule: str, what: str) -> Iterator[Ratio]:
    """Tokens per second of a long sequence over those of a short one, of the form that runs on long sequences."""
    short, long = FLAT_LENGTHS
    for name in (CHUNKWISE, "fla"):
        label = f"{name}: tokens/s at {long:,} over {short:,} tokens"
        yield from _ratio(run, rule, what, label, (name, short), (name, long), FLAT_TARGET, factor=long / short)


def _speedup(run: OpsRun, rule: str, what: str) -> Iterator[Ratio]:
    label = f"chunkwise over recurrent at {SPEEDUP_LENGTH:,} tokens"
    target = SPEEDUP_TARGET if what == "backward" else None
    yield from _ratio(run, rule, what, label, ("recurrent", SPEEDUP_LENGTH), (CHUNKWISE, SPEEDUP_LENGTH), target)


def _peers(run: OpsRun, rule: str, what: str) -> Iterator[Ratio]:
    targets = PEER_TARGETS.get((rule, what), {}) if run.settings.device == "cpu" else {}
    for length in run.settings.lengths:
        label = f"chunkwise over transformers at {length:,} tokens"
        yield from _ratio(run, rule, what, label, ("transformers", length), (CHUNKWISE, length), targets.get(length))


def _overhead(run: OpsRun, rule: str, what: str) -> Iterator[Ratio]:
    for length in OVERHEAD_LENGTHS:
        label = f"time of fla over its kernel alone at {length:,} tokens"
        yield from _ratio(run, rule, what, label, ("fla", length), (KERNEL, length), OVERHEAD_TARGET, at_most=True)


def _ratio(
    run: OpsRun,
    rule: str,
    what: str,
    label: str,
    above: tuple[str, int],
    below: tuple[str, int],
    target: float | None,
    *,
    factor: float = 1.0,
    at_most: bool = False,
) -> Iterator[Ratio]:
    """Yield the time of one competitor and length over that of another, times a factor; nothing if one is missing."""
    numerator, denominator = run.find(rule, what, *above), run.find(rule, what, *below)
    if numerator is not None and denominator is not None:
        rounds = [factor * ratio for ratio in paired_ratios(numerator.seconds, denominator.seconds)]
        of_minima = factor * min(numerator.seconds) / min(denominator.seconds)
        yield Ratio(rule, what, label, rounds, of_minima, target, at_most)
