"""Where the samples of an evaluation come from, so that every compared model reads exactly the same ones.

A source gives the samples of one task and length, again and again the same. Samples themselves are made and parsed by
`mnemon.data`; this module only asks, checks names and counts, and remembers.
"""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mnemon.data import babilong
from mnemon.data.babilong import Sample
from mnemon.errors import ConfigError
from mnemon.evaluation.scoring import TASK_LABELS

OFFICIAL_RESERVE = 300
"""Tokens of a length that the benchmark keeps free for instruction, examples and question."""

_CACHE_CHARACTERS = 256_000_000
"""Samples kept in memory between models; beyond that they are made again (1M-token samples are 4 MB each)."""


class SampleSource(Protocol):
    """Gives the samples of one task and length; the same ones every time it is asked."""

    def cell(self, task: str, length: str) -> Sequence[Sample]:
        """Give the samples of one task and length."""
        ...


@dataclass
class GeneratedSamples:
    """Fresh BABILong samples, cut to length with one tokenizer whatever model reads them later.

    Attributes:
        tokenizer: counts the tokens of a sample; in a comparison the first model's.
        num_samples: samples per task and length.
        samples_at: another number at some lengths, by length name.
        background: "stdlib", a folder of text files or "hf:<name>".
        split: which half of stories and background; evaluation uses "test".
        seed: the same seed gives the same samples.
        reserve_tokens: tokens of the length kept free for the prompt around the sample.
        stories: per task, stories to use in place of generated ones (for example the real bAbI test files).
    """

    tokenizer: Any
    num_samples: int
    background: str = "stdlib"
    split: Literal["train", "test"] = "test"
    seed: int = 0
    reserve_tokens: int = 0
    stories: Mapping[str, Sequence[Any]] | None = None
    samples_at: Mapping[str, int] = field(default_factory=dict)
    _kept: dict[tuple[str, str], Sequence[Sample]] = field(default_factory=dict, repr=False)
    _kept_characters: int = field(default=0, repr=False)

    def cell(self, task: str, length: str) -> Sequence[Sample]:
        """Make (or recall) the samples of one task and length."""
        if (task, length) not in self._kept:
            samples = self._make(task, length)
            self._kept_characters += sum(len(sample.input) for sample in samples)
            if self._kept_characters > _CACHE_CHARACTERS:
                return samples
            self._kept[task, length] = samples
        return self._kept[task, length]

    def _make(self, task: str, length: str) -> Sequence[Sample]:
        number = parse_length(length)
        options: dict[str, Any] = {"background": self.background, "split": self.split, "seed": self.seed}
        if self.stories is not None:
            if task not in self.stories:
                raise ConfigError(f"no stories for {task}; found {', '.join(sorted(self.stories)) or 'none'}")
            options["stories"] = self.stories[task]
        reserve = self.reserve_tokens if number else 0
        count = self.samples_at.get(length, self.num_samples)
        return list(babilong.generate(task, number, count, self.tokenizer, reserve_tokens=reserve, **options))


@dataclass(frozen=True)
class FixedSamples:
    """Samples that are already there, for example read from published JSON files.

    Attributes:
        cells: samples per (task, length name).
        num_samples: use only the first so many of each cell; None for all.
    """

    cells: Mapping[tuple[str, str], Sequence[Sample]]
    num_samples: int | None = None

    def tasks(self) -> list[str]:
        """Give the tasks there are samples for."""
        return sorted({task for task, _ in self.cells})

    def lengths(self) -> list[str]:
        """Give the lengths there are samples for."""
        return sorted({length for _, length in self.cells})

    def cell(self, task: str, length: str) -> Sequence[Sample]:
        """Look the samples of one task and length up."""
        if (task, length) not in self.cells:
            known = ", ".join(f"{a} at {b}" for a, b in sorted(self.cells)) or "nothing"
            raise ConfigError(f"no samples for {task} at {length}; the data holds {known}")
        return self.cells[task, length][: self.num_samples]


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Check task names, drop repeats and bring them into the benchmark's order.

    Raises:
        ConfigError: if there is none, or one is unknown; the nearest name is suggested.
    """
    if not tasks:
        raise ConfigError("no task given; expected some of qa1 ... qa20")
    for task in tasks:
        if task not in TASK_LABELS:
            near = difflib.get_close_matches(task.lower(), TASK_LABELS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown task {task!r}, expected qa1 ... qa20{hint}")
    return tuple(task for task in TASK_LABELS if task in tasks)


def check_lengths(lengths: Sequence[str]) -> tuple[str, ...]:
    """Check length names, drop repeats and sort them from short to long.

    Raises:
        ConfigError: if there is none, or one cannot be read.
    """
    if not lengths:
        raise ConfigError("no length given; expected some of 0k, 1k, 2k, 4k, ...")
    numbers = {parse_length(length): length for length in reversed(lengths)}
    return tuple(numbers[number] for number in sorted(numbers))


def parse_length(length: str) -> int:
    """Turn a length name such as "4k" into tokens (decimal thousands); ConfigError if it cannot be read."""
    return int(babilong.parse_length(length))


def sample_digest(sample: Sample) -> str:
    """Identify a sample by its content, whatever layout it is shown in."""
    return text_digest("\0".join((sample.input, sample.question, sample.target)))


def text_digest(text: str) -> str:
    """Give the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def slug(name: str) -> str:
    """Turn a label into a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
