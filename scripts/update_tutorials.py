"""Run examples and write what they print into their tutorials, docs/tutorials/*.md.

python scripts/update_tutorials.py                       # all
python scripts/update_tutorials.py compare_two_rules     # one
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mnemon.files import atomic_write_text

ROOT = Path(__file__).resolve().parents[1]
PRINTED = re.compile(r"^```text\n.*?^```", re.MULTILINE | re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scripts and write the pages; return the exit code."""
    known = sorted(page.stem.replace("-", "_") for page in (ROOT / "docs" / "tutorials").glob("*.md"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"examples: {', '.join(known)} (default: all)")
    for name in parser.parse_args(arguments).names or known:
        if name not in known:
            parser.error(f"no tutorial for {name!r}; there are {', '.join(known)}")
        page = ROOT / "docs" / "tutorials" / f"{name.replace('_', '-')}.md"
        block = f"```text\n{_output_of(ROOT / 'examples' / f'{name}.py').strip()}\n```"
        print(atomic_write_text(page, PRINTED.sub(lambda _, block=block: block, page.read_text(encoding="utf-8"))))
    return 0


def _output_of(script: Path) -> str:
    search = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": search},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
