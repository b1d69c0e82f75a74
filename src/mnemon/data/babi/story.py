"""The parts of a bAbI story: statements, questions and the list that holds both in reading order."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mnemon.errors import ConfigError

TASKS: tuple[str, ...] = tuple(f"qa{number}" for number in range(1, 21))
GENERATED_TASKS: tuple[str, ...] = TASKS[:10]
QUESTIONS_PER_STORY = 5
FRESH_STATEMENTS = 5  # a generated question hangs on one of this many last statements, as in the published files

Asked = tuple[str, str, tuple[int, ...]]  # question, answer, supporting lines


@dataclass(frozen=True)
class Statement:
    """One fact, `line` being its 1-based id inside the story."""

    line: int
    text: str


@dataclass(frozen=True)
class Question:
    """One question about the statements before it.

    `supporting` lists the ids of the statements that the answer rests on; several items of an answer are joined by
    commas without a space, as in the official files (`apple,milk`).
    """

    line: int
    text: str
    answer: str
    supporting: tuple[int, ...] = ()


@dataclass(frozen=True)
class Story:
    """A story of one task (`None` when the file does not say which), its lines in reading order."""

    task: str | None
    lines: tuple[Statement | Question, ...]

    @property
    def statements(self) -> tuple[Statement, ...]:
        """Return the facts in reading order."""
        return tuple(line for line in self.lines if isinstance(line, Statement))

    @property
    def questions(self) -> tuple[Question, ...]:
        """Return the questions in reading order."""
        return tuple(line for line in self.lines if isinstance(line, Question))

    def facts_before(self, question: Question) -> tuple[Statement, ...]:
        """Return the facts that stand before `question` (its line id decides)."""
        return tuple(statement for statement in self.statements if statement.line < question.line)


class StoryWriter:
    """Collects the lines of one story and numbers them."""

    def __init__(self) -> None:
        self.lines: list[Statement | Question] = []

    @property
    def next_line(self) -> int:
        """Id of the line to be written next."""
        return len(self.lines) + 1

    @property
    def fresh_since(self) -> int:
        """Line of the oldest statement that counts as fresh."""
        return [line.line for line in self.lines if isinstance(line, Statement)][-FRESH_STATEMENTS:][0]

    def state(self, text: str) -> None:
        """Append a statement."""
        self.lines.append(Statement(self.next_line, text))

    def ask(self, asked: Asked) -> None:
        """Append a question."""
        text, answer, supporting = asked
        self.lines.append(Question(self.next_line, text, answer, supporting))

    def finish(self) -> tuple[Statement | Question, ...]:
        """Return the lines written."""
        return tuple(self.lines)


def check_task(task: str, known: tuple[str, ...] = TASKS) -> str:
    """Return `task` if it is one of `known`.

    Raises:
        ConfigError: the task is unknown; the message suggests the nearest names.
    """
    if task in known:
        return task
    near = difflib.get_close_matches(str(task), known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"use one of {known[0]} ... {known[-1]}"
    if task in TASKS:
        hint = f"only {known[0]} ... {known[-1]} can be generated and solved"
    raise ConfigError(f"expected a task of {known[0]} ... {known[-1]}, got {task!r}; {hint}")
