"""Reading and writing BABILong samples in the JSON form of the published sets.

[
{"input": "... Mary moved to the bathroom. ...", "question": "Where is Mary?", "target": "bathroom"}
]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mnemon.data.sample import Sample, parse_length
from mnemon.errors import DataError
from mnemon.files import atomic_write_text, read_text

FIELDS = ("input", "question", "target")


def format_json(samples: Iterable[Sample]) -> str:
    """Return samples as a JSON list of objects with `input`, `question` and `target`, one per line."""
    records = ({"input": one.input, "question": one.question, "target": one.target} for one in samples)
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def write_json(path: str | Path, samples: Iterable[Sample]) -> Path:
    """Write samples in the published form; the file appears complete or not at all.

    Raises:
        RunError: the disk is full or the place is not writable.
    """
    return atomic_write_text(path, format_json(samples))


def read_json(path: str | Path, task: str = "", length: str | int = "") -> list[Sample]:
    """Read samples from a JSON list or from one JSON object per line (plain or `.gz`).

    Args:
        path: the file; other fields than `input`, `question` and `target` are ignored.
        task: their task; by default taken from a path such as `qa1/4k.json` or `qa1_4k.json`, else left empty.
        length: their nominal length; by default taken from the path, else 0.

    Raises:
        DataError: the file is missing, empty, damaged or not of this form; file and line or sample are named.
        ConfigError: `length` is no length.
    """
    path = Path(path)
    words = re.split(r"[^0-9A-Za-z]+", "/".join(path.parts[-2:]))
    task = task or next((word for word in reversed(words) if re.fullmatch(r"qa(1?[1-9]|10|20)", word)), "")
    named = length if length != "" else next((word for word in reversed(words) if re.fullmatch(r"\d+[kM]", word)), 0)
    tokens = parse_length(named)
    samples = []
    for where, record in _records(path, read_text(path)):
        samples.append(Sample(task, tokens, *_fields(record, where)))
    if not samples:
        raise DataError(f"{path}: expected at least one sample, got an empty list")
    return samples


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield where each record stands (for messages) and the record."""
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
        for number, record in enumerate(records, start=1):
            yield f"{path}, sample {number}", record
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from None


def _fields(record: Any, where: str) -> tuple[str, str, str]:
    """Return a record's input, question and target."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {', '.join(FIELDS)}, got {type(record).__name__}")
    for name in FIELDS:
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            got = "none" if name not in record else "an empty text" if isinstance(value, str) else type(value).__name__
            raise DataError(f"{where}: expected a text in the field {name!r}, got {got}")
    return record["input"], record["question"].strip(), record["target"].strip()
