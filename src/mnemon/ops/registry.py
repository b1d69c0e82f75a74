"""Find update rules by name: the files of `mnemon/ops/rules/`, entry points of other packages, rules of this process.

A built-in rule is a file `ops/rules/NAME.py` with a constant `RULE`. Another package offers a rule through an entry
point of the group `mnemon.rules` whose name is the rule's and whose value names its `RULE`:

    [project.entry-points."mnemon.rules"]
    my_rule = "my_package.my_rule:RULE"

Names are known without importing anything; a rule is imported when it is asked for. A script or notebook needs no
package: `register_rule(RULE)` makes its rule known while the process runs.
"""

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType

from mnemon.errors import ConfigError
from mnemon.ops import rules
from mnemon.ops.rule import UpdateRule

ENTRY_POINT_GROUP = "mnemon.rules"


def list_rules() -> tuple[str, ...]:
    """Return the names of all rules, sorted.

    Raises:
        ConfigError: if two rules share a name.
    """
    return tuple(sorted({*_loaders(), *_registered}))


def register_rule(rule: UpdateRule) -> UpdateRule:
    """Make a rule known under its name in this process: in layers, models, checks and benchmarks.

    A rule of that name registered before is replaced, so that a notebook's cell can run again; layers that exist keep
    the rule they were built with. A model that is saved needs the rule registered before it can be loaded.

    Args:
        rule: the declaration.

    Returns:
        The same rule.

    Raises:
        ConfigError: if an installed rule has that name.
    """
    if rule.name in _loaders():
        raise ConfigError(f"an installed update rule is called {rule.name!r} already; give yours another name")
    _registered[rule.name] = rule
    return rule


def get_rule(name: str) -> UpdateRule:
    """Return the rule of a name.

    Args:
        name: such as "gated_delta_net"; `list_rules` has them all.

    Returns:
        The rule.

    Raises:
        ConfigError: if there is no such rule (the message has the nearest name and all names), or if what stands under
            the name is not a rule of that name.
    """
    return _registered[name] if name in _registered else _installed_rule(name)


_registered: dict[str, UpdateRule] = {}


@functools.cache
def _installed_rule(name: str) -> UpdateRule:
    loaders = _loaders()
    if name not in loaders:
        known = list_rules()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no update rule is called {name!r}{hint} (known: {', '.join(known)})")
    rule = loaders[name]()
    if not isinstance(rule, UpdateRule):
        raise ConfigError(
            f"rule {name!r}: expected an UpdateRule, got {type(rule).__name__}; point to its RULE constant"
        )
    if rule.name != name:
        raise ConfigError(f"rule {name!r}: its RULE is named {rule.name!r}; the two names must be equal")
    return rule


@functools.cache
def _loaders() -> Mapping[str, Callable[[], object]]:
    """Map each rule's name, sorted, to a function that imports it."""
    found: dict[str, Callable[[], object]] = {}
    for module in pkgutil.iter_modules(rules.__path__):
        found[module.name] = functools.partial(_load_builtin, module.name)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in found:
            owner = entry.dist.name if entry.dist else entry.value
            raise ConfigError(f"two update rules are called {entry.name!r}; rename or remove the one of {owner}")
        found[entry.name] = functools.partial(_load_entry_point, entry)
    return MappingProxyType(dict(sorted(found.items())))


def _load_builtin(name: str) -> object:
    return getattr(importlib.import_module(f"{rules.__name__}.{name}"), "RULE", None)


def _load_entry_point(entry: importlib.metadata.EntryPoint) -> object:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rule {entry.name!r}: {entry.value} cannot be loaded ({error}); fix or remove it") from error
