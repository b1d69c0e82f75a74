"""Write the pages of finished benchmarks, docs/results/bench-*.md, and their figures. No number is typed by hand.

python scripts/update_benchmarks.py benchmarks/lm2-cpu benchmarks/lm2-layer-cpu --stream benchmarks/stream-cpu \
    --ops benchmarks/ops-cpu --mom benchmarks/mom-cpu --rmt benchmarks/rmt-cpu --generation benchmarks/generation-cpu

What `mnemon bench lm2 --flow layer` measured becomes a page of its own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mnemon.bench import mom, rmt, stream
from mnemon.bench.generation.measure import read_results as read_generation_results
from mnemon.bench.generation.report import write_page as write_generation_page
from mnemon.bench.ops.files import write_page
from mnemon.bench.ops.results import read_results as read_ops_results
from mnemon.bench.plots import all_charts
from mnemon.bench.report import markdown
from mnemon.bench.run import read_results
from mnemon.errors import MnemonError
from mnemon.files import atomic_write_bytes, atomic_write_text

ROOT = Path(__file__).resolve().parents[1]
_PAGES = {"depth": "bench-lm2", "layer": "bench-lm2-layer"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="folders with the results.json of `mnemon bench lm2`")
    parser.add_argument("--stream", type=Path, help="folder with the results.json of `mnemon bench stream`")
    parser.add_argument("--ops", type=Path, help="folder with the results.json of `mnemon bench ops`")
    parser.add_argument("--mom", type=Path, help="folder with the results.json of `mnemon bench mom`")
    parser.add_argument("--rmt", type=Path, help="folder with the results.json of `mnemon bench rmt`")
    parser.add_argument("--generation", type=Path, help="folder with the results.json of `mnemon bench generation`")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository (default: this one)")
    options = parser.parse_args(arguments)
    try:
        results = options.root / "docs" / "results"
        for run in [read_results(folder) for folder in options.folders]:
            charts, name = all_charts(run), _PAGES[run.settings.memories[0].flow]
            for chart in charts:
                atomic_write_bytes(results / f"{name}-{chart.name}", chart.png)
            page = markdown(run, [(chart.title, f"{name}-{chart.name}") for chart in charts])
            print(atomic_write_text(results / f"{name}.md", page))
        if options.stream is not None:
            reading = stream.read_results(options.stream)
            atomic_write_bytes(results / "bench-stream.png", stream.chart(reading))
            print(atomic_write_text(results / "bench-stream.md", stream.markdown(reading, "bench-stream.png")))
        if options.ops is not None:
            print(write_page(results / "bench-ops.md", read_ops_results(options.ops), "bench-ops-"))
        if options.mom is not None:
            print(mom.write_page(results / "bench-mom.md", mom.read_results(options.mom), "bench-mom-decode.png"))
        if options.rmt is not None:
            print(atomic_write_text(results / "bench-rmt.md", rmt.markdown(rmt.read_results(options.rmt))))
        if options.generation is not None:
            generated = read_generation_results(options.generation)
            print(write_generation_page(results / "bench-generation.md", generated, "bench-generation.png"))
    except MnemonError as error:
        print(f"update_benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
