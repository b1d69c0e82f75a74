"""The rows of a task: from a folder of JSONL files, from the made samples that come with the library, or from the hub.

    DIR/arc_easy/test.jsonl      {"question": "...", "choices": {"text": [...], "label": [...]}, "answerKey": "A"}
    DIR/mmlu/dev.jsonl           {"question": "...", "subject": "anatomy", "choices": [...], "answer": 2}

A file has the columns of the data set on the hub, one row per line, and is checked line by line before anything is
measured. With a folder the network is never asked.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from mnemon.errors import BackendUnavailable, ConfigError, DataError
from mnemon.evaluation.harness.catalogue import Suite, TaskEntry
from mnemon.files import parse_object, read_text

SAMPLE = "sample"
"""What `--data` is called for the made samples."""

Rows = list[dict[str, Any]]


class MissingData(DataError):
    """There is no data for a task at all, which a run of every suite notes and passes over."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def _is_number_below(limit: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 <= value < limit


def _is_labelled(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_texts(value.get("text"))
        and _is_texts(value.get("label"))
        and len(value["text"]) == len(value["label"])
    )


_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": _is_text,
    "text or nothing": lambda value: isinstance(value, str),
    "texts": _is_texts,
    "text or texts or nothing": lambda value: value == [] or isinstance(value, str) or _is_texts(value),
    "texts or nothing": lambda value: value == [] or _is_texts(value),
    "four texts": lambda value: isinstance(value, list) and [type(text) for text in value] == [str] * 4,
    "0 to 3": _is_number_below(4),
    "0 or 1": _is_number_below(2),
    "1 or 2": lambda value: value in ("1", "2"),
    "number as text": lambda value: isinstance(value, str) and value.isdecimal(),
    "labelled texts": _is_labelled,
    "text with _": lambda value: _is_text(value) and "_" in value,
}
"""What a column may hold, by the name used in the catalogue and in messages."""


@dataclass
class DataSource:
    """Gives the rows of a task's split, and remembers what it has read.

    Attributes:
        folder: where the files are; None = the hub.
        name: how to name the source in records.
    """

    folder: Path | None = None
    name: str = "hub"
    _read: dict[tuple[str, str], Rows] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, data: str | None, name: str | None = None) -> "DataSource":
        """Make the source that a command line asks for: None = the hub, `sample`, or a folder.

        Raises:
            DataError: there is no such folder.
        """
        if data is None:
            return cls()
        if data == SAMPLE:
            return cls(Path(str(resources.files("mnemon"))) / "data" / "suite_samples", "made samples of mnemon")
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise MissingData(f"{data}: no such folder of data; expected one such as DIR/arc_easy/test.jsonl")
        return cls(folder, name or data)

    def available(self, suite: Suite) -> list[str]:
        """Give the tasks of a suite there may be data for: all of them on the hub, in a folder those with a file."""
        folder = self.folder
        if folder is None:
            return [entry.name for entry in suite.tasks]
        return [entry.name for entry in suite.tasks if (folder / entry.data / f"{entry.split}.jsonl").is_file()]

    def rows(self, entry: TaskEntry, split: str) -> Rows:
        """Give the checked rows of one split of a task.

        Raises:
            MissingData: the file is not there, or has no row of the task's subject.
            DataError: a line is malformed.
            BackendUnavailable: the hub cannot be asked.
        """
        key = (entry.data, split)
        if key not in self._read:
            self._read[key] = self._from_hub(entry, split) if self.folder is None else self._from_file(entry, split)
        rows = self._read[key]
        if entry.subject is None:
            return rows
        chosen = [row for row in rows if row["subject"] == entry.subject]
        if not chosen:
            raise MissingData(f"{self._place(entry, split)}: no row with the subject {entry.subject!r}")
        return chosen

    def subjects(self, entry: TaskEntry) -> list[str]:
        """Give the subjects that the rows of a task's data belong to, in order of appearance."""
        self._read.setdefault(
            (entry.data, entry.split),
            self._from_hub(entry, entry.split) if self.folder is None else self._from_file(entry, entry.split),
        )
        return list(dict.fromkeys(row["subject"] for row in self._read[entry.data, entry.split]))

    def _place(self, entry: TaskEntry, split: str) -> str:
        return entry.hub[0] if self.folder is None else str(self.folder / entry.data / f"{split}.jsonl")

    def _from_file(self, entry: TaskEntry, split: str) -> Rows:
        assert self.folder is not None
        path = self.folder / entry.data / f"{split}.jsonl"
        if not path.is_file():
            raise MissingData(f"{path}: no such file; the task {entry.name} is read from there (see docs/suites.md)")
        return read_rows(path, entry.columns)

    def _from_hub(self, entry: TaskEntry, split: str) -> Rows:
        name, configuration = entry.hub
        ways = "give --data DIR with files of your own, or --data sample"
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise BackendUnavailable(f"{entry.name}: {name} is on the hub and HF_HUB_OFFLINE=1; {ways}")
        import datasets

        try:
            rows = list(datasets.load_dataset(name, configuration, split=split))
        except Exception as error:  # the library raises its own, the network's and the file system's kinds
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise BackendUnavailable(
                f"{entry.name}: cannot load {name} from the hub ({first.strip()}); {ways}"
            ) from error
        for column in entry.columns:
            if rows and column not in rows[0]:
                raise DataError(f"{name}, {split}: expected the column {column!r}, got {', '.join(rows[0])}; {ways}")
        return [dict(row) for row in rows]


def read_rows(path: Path, columns: Mapping[str, str]) -> Rows:
    """Read a JSONL file and check every line.

    Args:
        path: the file, one JSON object per line.
        columns: the columns that must be there, and what they hold, by the names of `_KINDS`.

    Raises:
        DataError: the file is missing, empty or damaged, or a line is not of this form; file and line are named.
    """
    rows: Rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_object(line, where)
        for name, kind in columns.items():
            if name not in row:
                raise DataError(f"{where}: expected the column {name!r} ({kind}), got {', '.join(row) or 'none'}")
            if not _KINDS[kind](row[name]):
                raise DataError(f"{where}: expected {kind} in the column {name!r}, got {_shown(row[name])}")
        if "answerKey" in columns and row["answerKey"] not in row["choices"]["label"]:
            raise DataError(f"{where}: the answerKey {row['answerKey']!r} is not among the labels of the choices")
        if "endings" in columns and int(row["label"]) >= len(row["endings"]):
            raise DataError(f"{where}: the label {row['label']} names no ending; there are {len(row['endings'])}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: expected at least one row, got none")
    return rows


def check_folder_option(data: list[Path] | None) -> str | None:
    """Turn the repeatable `--data` into one folder or word.

    Raises:
        ConfigError: it was given more than once.
    """
    if not data:
        return None
    if len(data) > 1:
        raise ConfigError(f"--data takes one folder (or sample) for these suites, got {len(data)}")
    return str(data[0])


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
