"""Reading, overriding and writing recipes: YAML in, YAML out, and one clear line for whatever is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mnemon.errors import ConfigError, DataError
from mnemon.files import atomic_write_text, read_text
from mnemon.training.data_sections import DATA_KINDS
from mnemon.training.recipe import Recipe


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("mnemon") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: path of a YAML file, or the name of a shipped recipe.
        overrides: `section.key=value` strings; the value is read as YAML and checked like the file's own.

    Returns:
        The checked recipe.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is out of range.
    """
    raw = _parse(_read(source), str(source))
    for override in overrides or []:
        _apply(raw, override)
    return check_recipe(raw, str(source))


def changed_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a recipe with overrides applied, as `load_recipe` applies them.

    Raises:
        ConfigError: a key is unknown, or a value is out of range.
    """
    raw = recipe.model_dump(mode="json")
    for override in overrides:
        _apply(raw, override)
    return check_recipe(raw, recipe.name)


def check_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Return the typed recipe of a nested dictionary.

    Args:
        raw: keys and values as read from YAML.
        source: name for the error message.

    Raises:
        ConfigError: naming the first unknown key by its dotted path, else the first wrong one.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        faults = error.errors()
        # A misspelt key is also missing under its right name; the misspelling is what there is to mend.
        first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
        raise ConfigError(f"{source}: {_describe(first)}") from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe (every default spelled out) as YAML."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    atomic_write_text(path, text)


def _read(source: str | Path) -> str:
    path = Path(source)
    name = str(source).removesuffix(".yaml")
    if not path.is_file() and name in shipped_recipes():
        return (resources.files("mnemon") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    if not path.is_file():
        raise ConfigError(f"no recipe {source}: expected a YAML file{_or_shipped(name)}")
    try:
        return read_text(path)
    except DataError as error:
        raise ConfigError(str(error)) from None


def _or_shipped(name: str) -> str:
    known = shipped_recipes()
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f" or one of: {', '.join(known)}"


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected sections such as model: and data:, got {type(raw).__name__}")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of a nested dictionary in place."""
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"--set {override}: expected section.key=value, for example optimisation.learning_rate=1e-3")
    *parents, last = path.strip().split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value") from None


def _describe(error: Any) -> str:
    """Return one line for one pydantic error."""
    location = [part for part in error["loc"] if part not in ("[key]",)]
    if error["type"] == "union_tag_invalid":
        return _wrong_kind(".".join(map(str, location)), error["ctx"]["tag"])
    section = _section_at(location[:-1])
    location = _without_kind(location)
    dotted = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {dotted}{_suggestion(location, section)}"
    if error["type"] == "missing":
        return f"{dotted} is missing"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    got = error.get("input")
    shown = "" if isinstance(got, dict | list) or error["type"] == "value_error" else f", got {got!r}"
    return f"{dotted}: {message}{shown}" if dotted else message


def _wrong_kind(dotted: str, kind: str) -> str:
    close = difflib.get_close_matches(kind, DATA_KINDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{dotted}.kind: expected one of {', '.join(DATA_KINDS)}, got {kind!r}{hint}"


def _without_kind(location: list[Any]) -> list[Any]:
    """Drop the kind that pydantic names between `data` and the key, which is not part of the file's path."""
    has_kind = location[:1] == ["data"] and len(location) > 1 and location[1] in DATA_KINDS
    return location[:1] + location[2:] if has_kind else location


def _suggestion(location: list[Any], section: type[BaseModel]) -> str:
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return (
        f"; did you mean {'.'.join([*map(str, location[:-1]), close[0]])}?" if close else f"; known: {', '.join(known)}"
    )


def _section_at(location: list[Any]) -> type[BaseModel]:
    """Return the section class that pydantic's path leads to; places in a list and other details change nothing."""
    section: type[BaseModel] = Recipe
    for part in location:
        if part in DATA_KINDS:
            section = DATA_KINDS[part]
        elif part in section.model_fields:
            section = next(iter(_sections_in(section.model_fields[part].annotation)), section)
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Go through the section classes that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)
