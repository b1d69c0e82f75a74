"""Accuracies from papers, to stand beside measured ones: other samples, other prompts and scorers, no tests."""

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("published.csv")
NOTE = (
    "Rows marked “published” are numbers of the papers, on other samples of BABILong and with scorers of their own: "
    "LM2, RMT-1.7B, Llama and RAG from arXiv:2502.06049 (tables 1 and 3); RMT, ARMT and Mamba of 130M–137M parameters, "
    "fine-tuned for each task, from the BABILong leaderboard (arXiv:2406.10149), without ARMT's qa5 from 4k on, which "
    "repeats the averages there. They carry no interval and no test."
)


@dataclass(frozen=True)
class PublishedRow:
    """One model at one length.

    Attributes:
        accuracies: percent by task.
    """

    model: str
    length: str
    accuracies: dict[str, float]

    def mean(self, tasks: Sequence[str]) -> float | None:
        """Give the mean over these tasks; None if one was not published."""
        if any(task not in self.accuracies for task in tasks):
            return None
        return sum(self.accuracies[task] for task in tasks) / len(tasks)


@functools.cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Give every published row, in the order of the file."""
    with _FILE.open(encoding="utf-8", newline="") as file:
        return tuple(
            PublishedRow(
                line["model"],
                line["length"],
                {task: float(text) for task, text in line.items() if task.startswith("qa") and text},
            )
            for line in csv.DictReader(file)
        )


def rows_at(length: str, tasks: Sequence[str]) -> list[PublishedRow]:
    """Give the rows of one length that have one of the tasks."""
    return [row for row in published_rows() if row.length == length and any(task in row.accuracies for task in tasks)]
