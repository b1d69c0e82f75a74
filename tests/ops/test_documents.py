"""The table of rules in the documents is the registry's."""

import importlib.util
from pathlib import Path


def test_the_table_of_rules_is_up_to_date(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "update_rules_table", repository / "scripts" / "update_rules_table.py"
    )
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (repository / "docs" / "rules.md").read_text(encoding="utf-8")
    assert script.with_table(page) == page, "run scripts/update_rules_table.py"
