"""Write the pages of finished studies, docs/results/NAME.md, their figures, and what they are made of.

python scripts/update_studies.py runs/studies/mom-mqar runs/studies/mom-text

No number is typed by hand. docs/results/runs/NAME.tar.gz holds the results and, of every run, recipe, summary and
measures, no weights: unpacked, it is a folder with which `mnemon reproduce` goes on.
"""

import argparse
import gzip
import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from mnemon.errors import MnemonError
from mnemon.files import atomic_write_bytes
from mnemon.studies.execution import MEASURES
from mnemon.studies.results import PLAN, RESULTS, read_results, write_page
from mnemon.training.run import RECIPE_FILE, SUMMARY_FILE

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders with the results.json of `mnemon reproduce`")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository (default: this one)")
    options = parser.parse_args(arguments)
    try:
        for folder, results in [(folder, read_results(folder)) for folder in options.folders]:
            name, pages = results["study"], options.root / "docs" / "results"
            print(write_page(pages / f"{name}.md", results, f"{name}-"))
            archive = pages / "runs" / f"{name}.tar.gz"
            print(atomic_write_bytes(archive, packed(folder)))
    except MnemonError as error:
        print(f"update_studies: error: {error}", file=sys.stderr)
        return 2
    return 0


def packed(folder: Path) -> bytes:
    """Return an archive of what the results of a study were made from; equal folders make equal archives."""
    measured = [path.parent for path in sorted(folder.glob(f"runs/**/{MEASURES}"))]
    files = [folder / PLAN, folder / RESULTS, *sorted(folder.glob("tokenizer/*"))]
    files += [run / name for run in measured for name in (RECIPE_FILE, SUMMARY_FILE, MEASURES)]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in files:
            entry = tarfile.TarInfo(str(path.relative_to(folder)))
            data = path.read_bytes()
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(content.getvalue(), mtime=0)


if __name__ == "__main__":
    sys.exit(main())
