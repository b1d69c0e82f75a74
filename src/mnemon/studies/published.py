"""Published numbers, to stand beside measured ones: never of the same size, data or protocol, and marked as such."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class PublishedRow:
    """Accuracies of one published model at one length, in percent.

    Attributes:
        by_task: task -> accuracy; tasks that were not reported are left out.
    """

    model: str
    length: str
    by_task: dict[str, float]


def published_babilong(length: str, tasks: Sequence[str]) -> Iterator[PublishedRow]:
    """Go through the published models that have a number for at least one of the tasks at a length."""
    for table in published()["babilong"]:
        for model, lengths in table["models"].items():
            row = dict(zip(table["tasks"], lengths.get(length, ()), strict=False))
            found = {task: float(row[task]) for task in tasks if row.get(task) is not None}
            if found:
                yield PublishedRow(model, length, found)


def babilong_sources() -> list[str]:
    """Return where the numbers of `published_babilong` come from, one sentence per table."""
    return [f"{', '.join(table['models'])}: {table['source']}." for table in published()["babilong"]]


@functools.cache
def published() -> dict[str, Any]:
    """Return all published numbers as `published.yaml` has them."""
    text = (resources.files("mnemon") / "studies" / "published.yaml").read_text(encoding="utf-8")
    value: dict[str, Any] = yaml.safe_load(text)
    return value
