"""Write the table of update rules in docs/rules.md from the registry; a test fails while the two differ.

python scripts/update_rules_table.py
"""

import pkgutil
import sys
from pathlib import Path

from mnemon.errors import DataError
from mnemon.files import atomic_write_text, read_text
from mnemon.ops import get_rule, rules
from mnemon.ops.description import markdown_table

BEGIN, END = "<!-- rules:begin -->", "<!-- rules:end -->"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "rules.md"


def with_table(text: str) -> str:
    """Return the page with the table of the rules that ship with mnemon between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{PAGE}: needs the lines {BEGIN} and {END}")
    shipped = [get_rule(module.name) for module in pkgutil.iter_modules(rules.__path__)]
    return f"{before}{BEGIN}\n{markdown_table(shipped)}{END}{after}"


def main() -> int:
    """Update the page; return the exit code."""
    print(atomic_write_text(PAGE, with_table(read_text(PAGE))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
