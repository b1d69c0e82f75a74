"""Stories told of the persons and places of all tasks, so that what is learned of a name in one task serves in all."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mnemon.data.babi.story import Question, Statement, Story
from mnemon.data.babi.world import PERSONS, PERSONS_QA5, PERSONS_QA10, PLACES, PLACES_QA10

ALL_PERSONS = tuple(sorted({*PERSONS, *PERSONS_QA5, *PERSONS_QA10}))
ALL_PLACES = tuple(sorted({*PLACES, *PLACES_QA10}))
_NAME = re.compile(rf"\b({'|'.join((*ALL_PERSONS, *ALL_PLACES))})\b")


@dataclass(frozen=True)
class Names:
    """Which name stands for which; one that is missing stands for itself.

    Two never stand for the same, so that what follows from a story does not change but for the names in it.
    """

    exchanged: Mapping[str, str] = field(default_factory=dict)

    def in_text(self, text: str) -> str:
        """Return a text with its names exchanged."""
        return _NAME.sub(lambda found: self.exchanged.get(found[0], found[0]), text) if self.exchanged else text

    def in_story(self, story: Story) -> Story:
        """Return a story with the names in its statements, questions and answers exchanged."""
        return Story(story.task, tuple(map(self._in_line, story.lines))) if self.exchanged else story

    def _in_line(self, line: Statement | Question) -> Statement | Question:
        if isinstance(line, Statement):
            return Statement(line.line, self.in_text(line.text))
        return Question(line.line, self.in_text(line.text), self.in_text(line.answer), line.supporting)


def draw_names(rng: random.Random) -> Names:
    """Draw which of all persons stands for which, and which of all places."""
    drawn: dict[str, str] = {}
    for known in (ALL_PERSONS, ALL_PLACES):
        drawn.update(zip(known, rng.sample(known, len(known)), strict=True))
    return Names(drawn)
