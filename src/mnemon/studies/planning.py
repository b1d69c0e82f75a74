"""From a study to its runs: which models, how large, on how many tokens. Nothing is trained here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from mnemon.errors import ConfigError
from mnemon.studies.study import Json, PlannedRun, Scale, Study, Variant
from mnemon.training.build import build_model, count_parameters, vocabulary_size
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import load_recipe
from mnemon.training.run import plan


def base_recipe(study: Study, scale: Scale, changes: Sequence[str] = ()) -> Recipe:
    """Return the base recipe of a study at a scale, with the changes of the user.

    Raises:
        ConfigError: a change is refused.
    """
    return load_recipe(scale.recipe or study.recipe, [*scale.changes, *changes])


def choose_variants(study: Study, scale: Scale, base: Recipe, only: Sequence[str] = ()) -> tuple[Variant, ...]:
    """Return the variants of a study whose name matches one of the patterns; no pattern = all.

    Args:
        study: what is compared.
        scale: whose rules count.
        base: from `base_recipe`.
        only: shell patterns such as `gla.*`.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    variants = study.variants(base, scale)
    names = [variant.name for variant in variants]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"such as {names[0]} or {names[-1]}"
            raise ConfigError(f"--only {pattern}: no variant of {study.name} at this scale is called so; {hint}")
    return tuple(v for v in variants if not only or any(fnmatchcase(v.name, pattern) for pattern in only))


def plan_runs(
    study: Study,
    scale: Scale,
    variants: Sequence[Variant],
    seeds: int,
    changes: Sequence[str] = (),
    rates: Mapping[str, float] | None = None,
) -> tuple[PlannedRun, ...]:
    """Return the runs of a study, seeds outermost, so that what is there first compares all variants.

    Args:
        study: what is compared.
        scale: sizes.
        variants: from `choose_variants`.
        seeds: the runs have seeds 0 to `seeds` - 1.
        changes: `section.key=value` for all runs; a variant's own come after them.
        rates: variant -> learning rate; None = the recipe's.

    Raises:
        ConfigError: a change is refused.
    """
    runs = tuple(
        _planned(study, scale, variant, seed, changes, None if rates is None else rates[variant.name])
        for seed in range(seeds)
        for variant in variants
    )
    tokens = {run.recipe.optimisation.max_tokens: run.variant.name for run in runs}
    if len(tokens) > 1:
        listing = ", ".join(f"{name} {count:,}" for count, name in tokens.items())
        raise ConfigError(f"a study compares runs of equal length, got tokens {listing}; set optimisation.max_tokens")
    return runs


def _planned(
    study: Study, scale: Scale, variant: Variant, seed: int, changes: Sequence[str], rate: float | None
) -> PlannedRun:
    own = [f"name={variant.name}-seed{seed}", f"seed={seed}"]
    if rate is not None:
        own.append(f"optimisation.learning_rate={rate!r}")
    source = variant.recipe or scale.recipe or study.recipe
    every = (*scale.changes, *changes, *variant.changes, *own)
    recipe = load_recipe(source, list(every))
    if recipe.optimisation.max_tokens is None:
        raise ConfigError("a study compares runs of equal length; set optimisation.max_tokens")
    if not recipe.evaluation.samples:
        raise ConfigError("a study measures its runs; set evaluation.samples to at least 1")
    return PlannedRun(variant, recipe, source, every, scale.samples, scale.lengths)


def model_facts(recipe: Recipe, lengths: Sequence[int]) -> Json:
    """Return the size of a recipe's model and of what it carries from token to token.

    Args:
        recipe: of one run.
        lengths: tokens read; 0 (facts alone, whose number varies) counts as 1.

    Returns:
        `parameters`: `total` and `active` for one token; `state_bytes`: length -> bytes per sequence after so many
        tokens, in float32: the memories with all that belongs to their state, or the keys and values of attention.
    """
    model = build_model(recipe, vocabulary_size(recipe, None)).eval()
    counts = count_parameters(model)
    return {
        "parameters": {name: counts[name] for name in ("total", "active")},
        "state_bytes": {str(length): _state_bytes(model, max(1, length)) for length in lengths},
    }


def counted_facts(recipe: Recipe) -> Json:
    """Return what `model_facts` returns of a model that is too large to be built: its size alone."""
    counts = plan(recipe)["parameters"]
    return {"parameters": {name: counts[name] for name in ("total", "active")}, "state_bytes": {}}


@torch.inference_mode()
def _state_bytes(model: Any, length: int) -> int:
    cache = model(torch.zeros(1, length, dtype=torch.int64), use_cache=True, logits_to_keep=1).past_key_values
    state = getattr(cache, "state", None)
    if state is not None:
        return int(state.num_bytes())
    return sum(_tensor_bytes(value) for layer in cache.layers for value in vars(layer).values())


def _tensor_bytes(value: Any) -> int:
    """Return the bytes of a tensor, or of all tensors in a dictionary or list; 0 for anything else."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_tensor_bytes(inner) for inner in value.values())
    return sum(_tensor_bytes(inner) for inner in value) if isinstance(value, list | tuple) else 0
