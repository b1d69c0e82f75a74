"""Write docs/results/study.md, the report over all studies, from what docs/results/runs/*.tar.gz keeps of them.

python scripts/update_study_report.py

`scripts/update_studies.py` writes these archives, and the figures that the report shows.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemon.errors import DataError, MnemonError
from mnemon.files import atomic_write_text
from mnemon.studies.report import report
from mnemon.studies.results import FORMAT, RESULTS

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository (default: this one)")
    pages = parser.parse_args(arguments).root / "docs" / "results"
    try:
        archives = sorted(pages.glob("runs/*.tar.gz"))
        if not archives:
            raise DataError(
                f"{pages / 'runs'}: expected archives of studies, found none; run scripts/update_studies.py"
            )
        results = {found["study"]: found for found in map(read_archived_results, archives)}
        print(
            atomic_write_text(pages / "study.md", "\n".join(report(results, {name: f"{name}.md" for name in results})))
        )
    except MnemonError as error:
        print(f"update_study_report: error: {error}", file=sys.stderr)
        return 2
    return 0


def read_archived_results(archive: Path) -> dict[str, Any]:
    """Return the results that an archive of a study holds.

    Raises:
        DataError: it is no such archive.
    """
    try:
        with tarfile.open(archive) as files:
            member = files.extractfile(RESULTS)
            found: dict[str, Any] = json.load(member) if member is not None else {}
    except (tarfile.TarError, KeyError, OSError, json.JSONDecodeError) as error:
        raise DataError(f"{archive}: is no archive of a study ({error}); run scripts/update_studies.py") from None
    if found.get("format") != FORMAT:
        raise DataError(f"{archive}: expected results of format {FORMAT}, got {found.get('format')!r}")
    return found


if __name__ == "__main__":
    sys.exit(main())
