"""What a study is: one base recipe, variants that differ from it in named keys, scales, and what is measured of a run.

A study says what is compared; planning, running and collecting are the same for all (`mnemon.studies.planning`,
`execution`, `results`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mnemon.training.recipe import Recipe

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

Json = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One model of the comparison.

    Attributes:
        name: of the variant, such as `RULE.ARM`; also a folder.
        rule: update rule of its memories; "attention" where it has none, "" where rules are not compared.
        arm: its place in the comparison.
        changes: `section.key=value`, what makes it differ from its recipe.
        recipe: shipped recipe; "" = the base recipe.
    """

    name: str
    rule: str
    arm: str
    changes: tuple[str, ...]
    recipe: str = ""


@dataclass(frozen=True)
class Scale:
    """One size of a study.

    Attributes:
        changes: `section.key=value`, applied to every recipe.
        seeds: seeds unless others are asked for.
        samples: samples per measured cell.
        rules: update rules; empty = all.
        lengths: names of the lengths at which runs are measured, where the recipe does not say it.
        recipe: shipped base recipe in the place of the study's.
        launched: the runs are too large to be trained by this command, which prints their launch lines instead and
            measures them when they are there.
    """

    changes: tuple[str, ...]
    seeds: int
    samples: int
    rules: tuple[str, ...] = ()
    lengths: tuple[str, ...] = ()
    recipe: str = ""
    launched: bool = False


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a study.

    Attributes:
        variant: what is trained.
        recipe: resolved, its seed and learning rate included.
        source: shipped recipe, and
        changes: `section.key=value`, what the resolved recipe is made of.
        samples: samples per measured cell.
        lengths: names of the lengths at which it is measured, where the recipe does not say it.
    """

    variant: Variant
    recipe: Recipe
    source: str
    changes: tuple[str, ...]
    samples: int
    lengths: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return variant, learning rate and seed as a relative path."""
        return f"{self.variant.name}/lr-{self.recipe.optimisation.learning_rate:g}/seed-{self.recipe.seed}"

    def folder(self, root: Path) -> Path:
        """Return the folder of the run below the folder of its study."""
        return root / "runs" / self.name


class Claim(NamedTuple):
    """What a paper says, with its place, and what came out here."""

    paper: str
    here: str


class Study(ABC):
    """A comparison that can be run again.

    Attributes:
        name: for the command line.
        title: heading of its page.
        recipe: name of the shipped base recipe.
        scales: sizes by name.
        equal_parameters: whether all variants have to have the same number of parameters, within 2 %.
        tunable: whether learning rates may be chosen per variant, by `score`; else recipes are compared as they are.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    recipe: ClassVar[str]
    scales: ClassVar[Mapping[str, Scale]]
    equal_parameters: ClassVar[bool] = False
    tunable: ClassVar[bool] = False

    @abstractmethod
    def variants(self, base: Recipe, scale: Scale) -> tuple[Variant, ...]:
        """Return what is compared.

        Args:
            base: base recipe, with the changes of the scale and of the user.
            scale: size.
        """

    def prepare(self, base: Recipe, root: Path) -> tuple[str, ...]:
        """Make what all runs share; return the changes that make them use it."""
        return ()

    @abstractmethod
    def lengths(self, recipe: Recipe) -> list[int]:
        """Return the lengths in tokens at which a run is measured, rising."""

    @abstractmethod
    def measure(self, run: PlannedRun, folder: Path) -> Json:
        """Measure a finished run; what is returned is kept beside the model as `measures.json`."""

    @abstractmethod
    def tokens_read(self, run: PlannedRun) -> int:
        """Return how many tokens the model of a run reads after its training, for the estimate of the time."""

    def score(self, folder: Path) -> float:
        """Return what a learning rate is chosen by, higher is better; nothing that is reported may enter."""
        raise NotImplementedError(f"{self.name} is not tunable")

    @abstractmethod
    def analyse(self, variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> Json:
        """Turn measurements into results.

        Args:
            variants: facts about every variant, as `results.json` has them; rows are added to them in place.
            measures: variant -> what `measure` returned, one per seed.

        Returns:
            Further entries of `results.json`, such as comparisons.
        """

    def write(self, root: Path, measures: Mapping[str, Sequence[Json]], results: Json) -> tuple[Path, ...]:
        """Write further folders beside results and page; return them."""
        return ()

    @abstractmethod
    def body(self, results: Json) -> list[str]:
        """Return the lines of the page between heading and circumstances."""

    @abstractmethod
    def findings(self, results: Json) -> list[str]:
        """Say in a few sentences what was found, for a report over several studies."""

    def claims(self, results: Json) -> list[Claim]:
        """Set what a paper says beside what came out here; nothing where no paper says anything of it."""
        return []

    @abstractmethod
    def summary(self, results: Json) -> list[str]:
        """Return the one or two tables that a report over several studies shows."""

    @abstractmethod
    def figures(self, results: Json) -> list[Plot]:
        """Draw the figures of the page."""


def points_text(test: Json) -> str:
    """Write the difference of a paired test in percentage points with its interval: "+7.0 [+3.1, +10.9]"."""
    low, mean, high = (f"{100 * test['difference'][end]:+.1f}" for end in ("low", "mean", "high"))
    return f"{mean} [{low}, {high}]"


def steps_text(results: Json) -> str:
    """Write of how many tokens the steps of training are, and which variants take others: "1,024 (lm2: 512)"."""
    usual = results["recipe"]["optimisation"]["batch_tokens"]
    by_size: dict[int, list[str]] = {}
    for variant in results["variants"]:
        by_size.setdefault(variant.get("step_tokens", usual), []).append(variant["name"])  # not in earlier results
    if len(by_size) == 1:
        return f"{next(iter(by_size)):,}"
    most = max(by_size, key=lambda size: len(by_size[size]))
    others = [f"{', '.join(names)}: {size:,}" for size, names in by_size.items() if size != most]
    return f"{most:,} ({'; '.join(others)})"


def state_text(variant: Json) -> str:
    """Write the bytes that a variant of `results.json` carries at the longest length; unknown of launched runs."""
    known = variant["state_bytes"]
    return f"{known[max(known, key=int)]:,}" if known else "–"
