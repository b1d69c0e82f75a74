"""What an evaluation leaves behind: predictions, cells and results as typed records, to JSON and back.

A cell is one model on one task at one length. Nothing here computes; the runner fills these records, tables and plots
read them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from mnemon.errors import DataError
from mnemon.metrics.intervals import Interval, wilson_interval

Layout = Literal["short", "official"]
Rule = Literal["exact", "official"]
LAYOUTS: tuple[Layout, ...] = ("short", "official")
T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """One answer: which sample, what was asked, what came back, both marks.

    `sample_sha256` identifies input, question and target whatever the prompt layout; `prompt_sha256` the exact text
    that the model read.
    """

    sample_id: str
    task: str
    length: str
    sample_sha256: str
    prompt_sha256: str
    question: str
    target: str
    output: str
    exact: bool
    official: bool


@dataclass(frozen=True)
class RetrievalCounts:
    """What a retriever did for one cell.

    Attributes:
        text_tokens: tokens of all retrieved texts together, in the model's own tokens.
        recall: mean share of a sample's supporting facts that were retrieved; None where no sample names them.
        num_known: samples that name their supporting facts.
        seconds: wall time of cutting, indexing and searching.
    """

    text_tokens: int
    recall: float | None
    num_known: int
    seconds: float


@dataclass(frozen=True)
class Cell:
    """All predictions of one model for one task and length, with the time they took.

    Attributes:
        length: name of the length, "0k", "1k", ...
        seconds: wall time of generation, model calls only.
        prompt_tokens: tokens of all prompts together, padding not counted.
        new_tokens: tokens generated, padding not counted.
        retrieval: what was retrieved; None for a model that reads the whole text.
    """

    task: str
    length: str
    predictions: tuple[Prediction, ...]
    seconds: float
    prompt_tokens: int
    new_tokens: int
    retrieval: RetrievalCounts | None = None

    def marks(self, rule: Rule) -> list[bool]:
        """Give one right/wrong mark per sample by the chosen rule."""
        return [prediction.exact if rule == "exact" else prediction.official for prediction in self.predictions]

    def accuracy(self, rule: Rule) -> Interval:
        """Give the share of right answers with its 95 % Wilson interval."""
        marks = self.marks(rule)
        return wilson_interval(sum(marks), len(marks))

    @property
    def tokens_per_second(self) -> float:
        """Prompt and new tokens per second of generation."""
        return (self.prompt_tokens + self.new_tokens) / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything besides the model that decides the predictions.

    Attributes:
        num_samples: samples per task and length.
        samples_at: another number at some lengths, by length name.
    """

    tasks: tuple[str, ...]
    lengths: tuple[str, ...]
    num_samples: int
    seed: int
    background: str
    stories: str
    split: str
    layout: Layout
    max_new_tokens: int
    samples_at: dict[str, int] = field(default_factory=dict)

    def samples_for(self, length: str) -> int:
        """Give the samples per task at one length."""
        return self.samples_at.get(length, self.num_samples)

    @property
    def rule(self) -> Rule:
        """Rule of the headline numbers: exact words for the short layout, the official one for the official prompt."""
        return "exact" if self.layout == "short" else "official"


@dataclass(frozen=True)
class ModelInfo:
    """What a reader must know about a model to read its row.

    Attributes:
        role: "lm2", "rmt", "knocked_out", "mom", "linear_memory", "window", "plain" or "retrieval".
        num_parameters: all parameters, shared ones once.
        num_active_parameters: those that one token meets; None in results of earlier versions, which had no routers.
        weights: digest of the parameters.
        training: facts from the run that made the checkpoint, such as tokens seen and longest length; empty if unknown.
        retrieval: settings of the retriever whose findings it reads; empty if it reads the whole text.
    """

    source: str
    model_type: str
    role: str
    num_parameters: int
    num_memory_parameters: int = 0
    weights: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    num_active_parameters: int | None = None
    retrieval: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BabilongResult:
    """One model's answers over tasks and lengths."""

    label: str
    model: ModelInfo
    settings: EvaluationSettings
    generate_kwargs: dict[str, Any]
    cells: tuple[Cell, ...]

    def cell(self, task: str, length: str) -> Cell:
        """Give the cell of one task and length; KeyError if it was not evaluated."""
        for cell in self.cells:
            if (cell.task, cell.length) == (task, length):
                return cell
        raise KeyError((task, length))

    def marks(self, length: str, rule: Rule, tasks: tuple[str, ...] | None = None) -> list[bool]:
        """Give the marks of several tasks (default all) at one length, in the order of the settings."""
        chosen = self.settings.tasks if tasks is None else tasks
        return [mark for task in chosen for mark in self.cell(task, length).marks(rule)]

    def predictions(self) -> Iterator[Prediction]:
        """Go through every prediction, cell by cell."""
        for cell in self.cells:
            yield from cell.predictions


def to_json(record: Any) -> str:
    """Write a record of this module (or a tuple of them) as indented JSON, keys in field order."""
    value = [asdict(item) for item in record] if isinstance(record, (list, tuple)) else asdict(record)
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def result_from_json(text: str, *, name: str = "results") -> BabilongResult:
    """Read a `BabilongResult` back from `to_json`'s text.

    Args:
        text: the JSON.
        name: file name for error messages.

    Returns:
        A result equal to the one written.

    Raises:
        DataError: if the text is not JSON or has missing or unknown fields.
    """
    return result_from_dict(parse_json(text, name), name=name)


def result_from_dict(value: Mapping[str, Any], *, name: str = "results") -> BabilongResult:
    """Build a `BabilongResult` from parsed JSON; DataError if fields are missing or unknown."""
    settings = {**_mapping(value, "settings", name)}
    settings |= {key: tuple(settings.get(key, ())) for key in ("tasks", "lengths")}
    return _build(
        BabilongResult,
        {
            **value,
            "model": _build(ModelInfo, _mapping(value, "model", name), name),
            "settings": _build(EvaluationSettings, settings, name),
            "cells": tuple(cell_from_dict(cell, name=name) for cell in value.get("cells", ())),
        },
        name,
    )


def cell_from_json(text: str, *, name: str = "cell") -> Cell:
    """Read a `Cell` back from `to_json`'s text; DataError if it is malformed."""
    return cell_from_dict(parse_json(text, name), name=name)


def cell_from_dict(value: Mapping[str, Any], *, name: str = "cell") -> Cell:
    """Build a `Cell` from parsed JSON; DataError if fields are missing or unknown."""
    predictions = tuple(_build(Prediction, item, name) for item in value.get("predictions", ()))
    counts = value.get("retrieval")
    retrieval = None if counts is None else _build(RetrievalCounts, counts, name)
    return _build(Cell, {**value, "predictions": predictions, "retrieval": retrieval}, name)


def parse_json(text: str, name: str) -> Mapping[str, Any]:
    """Parse a JSON object; DataError with the file's name and line if it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}: not valid JSON at line {error.lineno} ({error.msg}); delete it or --overwrite"
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected a JSON object, got {type(value).__name__}")
    return value


def _mapping(value: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    inner = value.get(key)
    if not isinstance(inner, dict):
        raise DataError(f"{name}: expected an object under {key!r}")
    return inner


def _build(kind: type[T], value: Mapping[str, Any], name: str) -> T:
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(value) - known):
        raise DataError(f"{name}: unknown field {unknown[0]!r} in {kind.__name__}")
    try:
        return kind(**value)
    except TypeError as error:
        raise DataError(f"{name}: {kind.__name__} is incomplete ({error})") from None
