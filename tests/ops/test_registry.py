"""Finding rules by name, in this package and in others."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mnemon.errors import ConfigError
from mnemon.ops import get_rule, list_rules, register_rule, registry, rules


@pytest.fixture
def other_package(tmp_path: Path, repository: Path) -> Path:
    """Return a folder with the documented example as it would lie in site-packages: module, metadata, entry point."""
    page = (repository / "docs" / "adding-a-rule.md").read_text(encoding="utf-8")
    module, entry_points = (re.search(f"^```{kind}\n(.*?)^```", page, re.M | re.S) for kind in ("python", "toml"))
    assert module is not None
    assert entry_points is not None
    metadata = tmp_path / "leaky_memory-1.0.dist-info"
    metadata.mkdir()
    (tmp_path / "leaky_memory.py").write_text(module.group(1), encoding="utf-8")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: leaky-memory\nVersion: 1.0\n", encoding="utf-8")
    declared = tomllib.loads(entry_points.group(1))["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in declared.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    registry._loaders.cache_clear()
    registry._installed_rule.cache_clear()
    yield
    registry._loaders.cache_clear()
    registry._installed_rule.cache_clear()


def test_every_file_is_a_rule_of_its_name() -> None:
    files = sorted(path.stem for path in Path(rules.__path__[0]).glob("*.py") if path.stem != "__init__")
    assert list(list_rules()) == files
    assert [get_rule(name).name for name in files] == files


def test_an_unknown_name_gets_the_nearest_and_the_list() -> None:
    with pytest.raises(ConfigError, match=r"'gated_deltanet'; did you mean 'gated_delta_net'\? \(known: .*mamba2.*\)"):
        get_rule("gated_deltanet")


def test_a_rule_of_another_package_passes_the_checks(other_package: Path) -> None:
    code = """
from mnemon.ops import get_rule, list_rules
from mnemon.ops.checks import CHECKS, variants
assert "leaky" in list_rules()
rule = get_rule("leaky")
for check in CHECKS:
    for options in variants(rule):
        check(rule, options)
print("all checks passed", rule.forms)
"""
    search = [str(other_package), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {search!r}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "all checks passed ('recurrent',)\n", done.stderr


def entry(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name=name, value=value, group=registry.ENTRY_POINT_GROUP)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (entry("gla", "elsewhere:RULE"), "two update rules are called 'gla'"),
        (entry("extra", "mnemon.ops.rules.gla:RULE"), "its RULE is named 'gla'; the two names must be equal"),
        (entry("extra", "mnemon.ops.rules.gla:step"), "expected an UpdateRule, got function"),
        (entry("extra", "no_such_package:RULE"), r"no_such_package:RULE cannot be loaded \(No module named"),
    ],
)
@pytest.mark.usefixtures("fresh_registry")
def test_a_wrong_entry_point_is_named(
    found: importlib.metadata.EntryPoint, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [found])
    with pytest.raises(ConfigError, match=message):
        get_rule("extra")


@pytest.mark.usefixtures("fresh_registry")
def test_a_broken_package_leaves_the_other_rules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [entry("extra", "no_such_package:RULE")])
    assert "extra" in list_rules()
    assert get_rule("gla").name == "gla"


def test_a_rule_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        get_rule("gla").name = "other"  # type: ignore[misc]


def test_a_rule_of_this_process_is_known_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    own = register_rule(replace(get_rule("gla"), name="my_rule"))
    assert get_rule("my_rule") is own
    assert set(list_rules()) - {"my_rule"} == {path.stem for path in Path(rules.__path__[0]).glob("[a-z]*.py")}
    assert list(list_rules()) == sorted(list_rules())
    with pytest.raises(ConfigError, match="did you mean 'my_rule'"):
        get_rule("my_rulee")
    again = register_rule(replace(own, chunk_size=16))
    assert get_rule("my_rule") is again


def test_a_rule_of_this_process_never_hides_an_installed_one() -> None:
    with pytest.raises(ConfigError, match="an installed update rule is called 'gla' already"):
        register_rule(replace(get_rule("gla"), chunk_size=16))
    assert get_rule("gla").chunk_size == importlib.import_module("mnemon.ops.rules.gla").RULE.chunk_size
