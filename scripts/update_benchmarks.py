"""Write docs/results/bench-lm2.md and its figures from finished benchmarks. No number is typed by hand.

python scripts/update_benchmarks.py benchmarks/lm2-cpu
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mnemon.bench.plots import all_charts
from mnemon.bench.report import markdown
from mnemon.bench.run import read_results
from mnemon.errors import MnemonError
from mnemon.files import atomic_write_bytes, atomic_write_text

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the results.json of `mnemon bench lm2`")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository (default: this one)")
    options = parser.parse_args(arguments)
    try:
        run = read_results(options.folder)
        charts = all_charts(run)
        results = options.root / "docs" / "results"
        for chart in charts:
            atomic_write_bytes(results / f"bench-lm2-{chart.name}", chart.png)
        page = markdown(run, [(chart.title, f"bench-lm2-{chart.name}") for chart in charts])
        print(atomic_write_text(results / "bench-lm2.md", page))
    except MnemonError as error:
        print(f"update_benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
