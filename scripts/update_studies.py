"""Write the pages of finished studies, docs/results/NAME.md, and their figures. No number is typed by hand.

python scripts/update_studies.py runs/studies/mom-mqar runs/studies/mom-text
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mnemon.errors import MnemonError
from mnemon.studies.results import read_results, write_page

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders with the results.json of `mnemon reproduce`")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository (default: this one)")
    options = parser.parse_args(arguments)
    try:
        for results in [read_results(folder) for folder in options.folders]:
            name = results["study"]
            print(write_page(options.root / "docs" / "results" / f"{name}.md", results, f"{name}-"))
    except MnemonError as error:
        print(f"update_studies: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
