"""Reading and writing the official bAbI text format, plain or gzip-compressed.

    1 Mary moved to the bathroom.
    2 John went to the hallway.
    3 Where is Mary? <TAB>bathroom<TAB>1

An id of 1 starts a new story.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mnemon.data.babi.story import Question, Statement, Story
from mnemon.errors import DataError
from mnemon.files import read_text


def read(path: str | Path) -> list[Story]:
    """Read the stories of one file of any of the twenty tasks.

    Args:
        path: a text file, or a gzip-compressed one ending in `.gz`. The task is taken from a name such as
            `qa1_single-supporting-fact_test.txt` and is `None` otherwise.

    Returns:
        The stories in file order.

    Raises:
        DataError: the file is missing, empty, cut off, not UTF-8 or malformed; file and line are named.
    """
    path = Path(path)
    found = re.match(r"(qa(?:1?\d|20))(?!\d)", path.name)
    task = found.group(1) if found and found.group(1) != "qa0" else None
    stories: list[Story] = []
    lines: list[Statement | Question] = []
    for number, text in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        line = _parse_line(text, len(lines) + 1, lines, f"{path}, line {number}")
        if line.line == 1 and lines:
            stories.append(Story(task, tuple(lines)))
            lines = []
        lines.append(line)
    stories.append(Story(task, tuple(lines)))
    return stories


def _parse_line(text: str, expected: int, before: Sequence[Statement | Question], where: str) -> Statement | Question:
    identifier, _, rest = text.strip().partition(" ")
    if not identifier.isascii() or not identifier.isdigit():
        raise DataError(f"{where}: expected 'ID text', got {text[:60]!r}")
    line = int(identifier)
    if line not in (1, expected):
        raise DataError(f"{where}: expected the id {expected} (or 1 for a new story), got {line}")
    if line == 1:
        before = ()
    if "\t" not in text:
        if not rest.strip():
            raise DataError(f"{where}: expected a sentence after the id, got none")
        if rest.rstrip().endswith("?"):
            raise DataError(f"{where}: expected an answer after the question, separated by a tab, got none")
        return Statement(line, rest.strip())
    return _parse_question(line, rest, before, where)


def _parse_question(line: int, rest: str, before: Sequence[Statement | Question], where: str) -> Question:
    fields = [field.strip() for field in rest.split("\t")]
    if len(fields) != 3 or not fields[0]:
        raise DataError(f"{where}: expected 'question<TAB>answer<TAB>supporting ids', got {len(fields)} field(s)")
    question, answer, support = fields
    if not answer:
        raise DataError(f"{where}: expected an answer, got an empty field")
    facts = {earlier.line for earlier in before if isinstance(earlier, Statement)}
    identifiers: list[int] = []
    for word in support.split():
        if not word.isascii() or not word.isdigit() or int(word) not in facts:
            raise DataError(f"{where}: expected supporting ids of earlier facts of this story, got {word!r}")
        identifiers.append(int(word))
    if not identifiers:
        raise DataError(f"{where}: expected at least one supporting id, got none")
    return Question(line, question, answer, tuple(identifiers))


def format_stories(stories: Iterable[Story]) -> str:
    """Return stories in the official text format; `read` gives them back unchanged."""
    lines: list[str] = []
    for story in stories:
        for line in story.lines:
            if isinstance(line, Question):
                support = " ".join(map(str, line.supporting))
                lines.append(f"{line.line} {line.text} \t{line.answer}\t{support}")
            else:
                lines.append(f"{line.line} {line.text}")
    return "".join(f"{line}\n" for line in lines)
