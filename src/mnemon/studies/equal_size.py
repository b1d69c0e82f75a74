"""Models of equal size: feed-forward layers as wide as it takes, and a check that it has been done."""

from __future__ import annotations

from collections.abc import Sequence

from mnemon.errors import ConfigError
from mnemon.studies.study import PlannedRun
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import changed_recipe
from mnemon.training.run import plan

_WITHIN = 0.02
_KEY = "intermediate_size"
_LARGE, _ROUND = 1024, 64
"""Feed-forward layers from this width on stay a multiple of what matrix units like."""


def as_large_as(base: Recipe, changes: Sequence[str]) -> tuple[str, ...]:
    """Return the changes with one more: the width of the feed-forward layers that makes up for the parameters.

    Args:
        base: the model to be equalled; it is only counted, on no device.
        changes: `section.key=value`, what makes another model of it.
    """
    assert base.model.base is not None
    width = int(base.model.base[_KEY])
    wanted, narrow, wide = (
        parameters(changed_recipe(base, [*own, f"model.base.{_KEY}={size}"]))
        for own, size in (((), width), (changes, width), (changes, 2 * width))
    )
    step = _ROUND if width >= _LARGE else 1
    equal = width + step * round((wanted - narrow) * width / (wide - narrow) / step)
    return (*changes, f"model.base.{_KEY}={equal}")


def parameters(recipe: Recipe) -> int:
    """Return the number of parameters of a recipe's model, counted without weights."""
    return int(plan(recipe)["parameters"]["total"])


def refuse_unequal(runs: Sequence[PlannedRun]) -> None:
    """Refuse a comparison of models that differ in size by more than 2 %; a variant is counted once for all seeds.

    Raises:
        ConfigError: they do.
    """
    recipes = {run.variant.name: run.recipe for run in reversed(runs)}
    totals = {name: parameters(recipe) for name, recipe in recipes.items()}
    largest, smallest = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
    if totals[largest] > (1 + _WITHIN) * totals[smallest]:
        raise ConfigError(
            f"the models differ in size by more than {100 * _WITHIN:.0f} %: {largest} has {totals[largest]:,} "
            f"parameters, {smallest} {totals[smallest]:,}; change model.base.{_KEY} of one of them"
        )
