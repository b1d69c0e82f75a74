"""Training: typed recipes, a curriculum by achievement, exact resume. Start at `load_recipe` and `train`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemon.training.recipe import Recipe
    from mnemon.training.recipe_io import load_recipe, save_recipe, shipped_recipes
    from mnemon.training.run import plan, train

__all__ = ["Recipe", "load_recipe", "plan", "save_recipe", "shipped_recipes", "train"]

_HOMES = {
    "Recipe": "recipe",
    "load_recipe": "recipe_io",
    "save_recipe": "recipe_io",
    "shipped_recipes": "recipe_io",
    "plan": "run",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    """Resolve a public name on first access, so that reading a recipe does not load torch."""
    if name in _HOMES:
        return getattr(import_module(f"mnemon.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mnemon.training' has no attribute {name!r}")
