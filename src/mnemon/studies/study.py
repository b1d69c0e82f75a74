"""What a study is: one base recipe, variants that differ from it in named keys, scales, and what is measured of a run.

A study says what is compared; planning, running and collecting are the same for all (`mnemon.studies.planning`,
`execution`, `results`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mnemon.training.recipe import Recipe

if TYPE_CHECKING:
    from mnemon.evaluation.plots import Plot

Json = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One model of the comparison.

    Attributes:
        name: of the variant, `RULE.ARM`; also a folder.
        rule: update rule of its memories; "attention" where it has none.
        arm: what stands in the place of attention, or what an ablation changes.
        changes: `section.key=value`, what makes it differ from the base recipe.
    """

    name: str
    rule: str
    arm: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """One size of a study.

    Attributes:
        changes: `section.key=value`, applied to the base recipe.
        seeds: seeds unless others are asked for.
        samples: samples per measured cell.
        rules: update rules; empty = all.
    """

    changes: tuple[str, ...]
    seeds: int
    samples: int
    rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a study.

    Attributes:
        variant: what is trained.
        recipe: resolved, its seed and learning rate included.
        samples: samples per measured cell.
    """

    variant: Variant
    recipe: Recipe
    samples: int

    @property
    def name(self) -> str:
        """Return variant, learning rate and seed as a relative path."""
        return f"{self.variant.name}/lr-{self.recipe.optimisation.learning_rate:g}/seed-{self.recipe.seed}"

    def folder(self, root: Path) -> Path:
        """Return the folder of the run below the folder of its study."""
        return root / "runs" / self.name


class Study(ABC):
    """A comparison that can be run again.

    Attributes:
        name: for the command line.
        title: heading of its page.
        recipe: name of the shipped base recipe.
        scales: sizes by name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    recipe: ClassVar[str]
    scales: ClassVar[Mapping[str, Scale]]

    @abstractmethod
    def variants(self, base: Recipe, rules: Sequence[str]) -> tuple[Variant, ...]:
        """Return what is compared.

        Args:
            base: base recipe, with the changes of the scale and of the user.
            rules: update rules.
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
    def score(self, folder: Path) -> float:
        """Return what a learning rate is chosen by, higher is better; nothing that is reported may enter."""

    @abstractmethod
    def analyse(self, variants: Sequence[Json], measures: Mapping[str, Sequence[Json]]) -> Json:
        """Turn measurements into results.

        Args:
            variants: facts about every variant, as `results.json` has them; rows are added to them in place.
            measures: variant -> what `measure` returned, one per seed.

        Returns:
            Further entries of `results.json`, such as comparisons.
        """

    @abstractmethod
    def body(self, results: Json) -> list[str]:
        """Return the lines of the page between heading and circumstances."""

    @abstractmethod
    def figures(self, results: Json) -> list[Plot]:
        """Draw the figures of the page."""
