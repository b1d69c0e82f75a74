"""An oracle for qa1-qa10 that reads the sentences of a story and answers from them alone.

It shares no code with the simulator of `mnemon.data.babi.world`: the simulator knows what happened, the solver only
what is written. Where the two agree, the written story is sufficient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mnemon.data.babi.story import Question, Statement, Story
from mnemon.errors import DataError

COUNT_WORDS = ("none", "one", "two", "three")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

_SENTENCES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("move", r"(?P<who>\w+) (?:went to|went back to|journeyed to|travelled to|moved to) the (?P<place>\w+)\."),
        ("get", r"(?P<who>\w+) (?:grabbed|took|got|picked up) the (?P<what>\w+)(?: there)?\."),
        ("drop", r"(?P<who>\w+) (?:dropped|put down|left|discarded) the (?P<what>\w+)(?: there)?\."),
        ("give", r"(?P<who>\w+) (?:gave|passed|handed) the (?P<what>\w+) to (?P<to>\w+)\."),
        ("in", r"(?P<who>\w+) is in the (?P<place>\w+)\."),
        ("out", r"(?P<who>\w+) is (?:not|no longer) in the (?P<place>\w+)\."),
        ("either", r"(?P<who>\w+) is either in the (?P<place>\w+) or the (?P<other>\w+)\."),
        ("beside", r"The (?P<place>\w+) is (?P<side>north|south|east|west) of the (?P<other>\w+)\."),
    )
)


@dataclass(frozen=True)
class Event:
    """What one sentence says, by the names of the patterns above."""

    line: int
    kind: str
    who: str = ""
    what: str = ""
    place: str = ""
    other: str = ""
    to: str = ""
    side: str = ""


@dataclass(frozen=True)
class Solution:
    """An answer and the ids of the lines it rests on (in the order the official files list them)."""

    answer: str
    supporting: tuple[int, ...]


def parse(statement: Statement) -> Event:
    """Return what a statement of qa1-qa10 says.

    Raises:
        DataError: the sentence is none of the forms used in qa1-qa10.
    """
    for kind, pattern in _SENTENCES:
        if found := pattern.fullmatch(statement.text):
            return Event(statement.line, kind, **found.groupdict())
    raise DataError(f"line {statement.line}: expected a sentence of qa1-qa10, got {statement.text!r}")


def solve(story: Story, question: Question) -> str:
    """Answer `question` from the statements of `story` that stand before it; its own answer is never looked at.

    Args:
        story: a story of qa1-qa10, read or generated.
        question: a question with its line id; only `text` and `line` are used.

    Returns:
        The answer in the official spelling, for example `"garden"`, `"yes"`, `"none"` or `"apple,milk"`.

    Raises:
        DataError: a sentence or the question has an unknown form, or the facts do not settle the answer.
    """
    return explain(story, question).answer


def explain(story: Story, question: Question) -> Solution:
    """Answer as `solve` does and also name the supporting lines."""
    return answer_from([parse(statement) for statement in story.facts_before(question)], question.text)


def answer_from(events: Sequence[Event], question: str) -> Solution:
    """Answer a question's text from parsed events in reading order.

    Raises:
        DataError: the question has an unknown form, or the events do not settle it.
    """
    for pattern, rule in _QUESTIONS:
        if found := pattern.fullmatch(question.strip()):
            solution = rule(events, **found.groupdict())
            if solution is None:
                raise DataError(f"the facts do not settle the question {question.strip()!r}")
            return solution
    raise DataError(f"expected a question of qa1-qa10, got {question!r}")


def last_location(events: Sequence[Event], who: str, before: int | None = None) -> Event | None:
    """Return the last event that says anything about where `who` is, optionally only lines before `before`."""
    for event in reversed(events):
        in_time = before is None or event.line < before
        if in_time and event.who == who and event.kind in ("move", "in", "out", "either"):
            return event
    return None


def _where_is_person(events: Sequence[Event], who: str) -> Solution | None:
    last = last_location(events, who)
    return Solution(last.place, (last.line,)) if last and last.kind in ("move", "in") else None


def _is_person_there(events: Sequence[Event], who: str, place: str) -> Solution | None:
    last = last_location(events, who)
    if last is None:
        return None
    if last.kind == "either":
        answer = "maybe" if place in (last.place, last.other) else "no"
    elif last.kind == "out":
        answer = "no"
    else:
        answer = "yes" if place == last.place else "no"
    return Solution(answer, (last.line,))


def _handling(events: Sequence[Event], what: str) -> list[Event]:
    return [event for event in events if event.what == what]


def _holder_after(event: Event) -> str | None:
    """Return who holds the object once `event` (a get, drop or give of it) is over."""
    return {"get": event.who, "give": event.to, "drop": None}[event.kind]


def _where_is_object(events: Sequence[Event], what: str) -> Solution | None:
    handled = _handling(events, what)
    if not handled:
        return None
    last = handled[-1]
    holder = _holder_after(last)
    place = last_location(events, holder) if holder else last_location(events, last.who, before=last.line)
    return Solution(place.place, (last.line, place.line)) if place else None


def object_track(events: Sequence[Event], what: str) -> list[Event]:
    """Return the moves that tell an object's places in order, equal neighbouring places merged.

    The place counts from the moment it follows from the text: a holder who has not moved yet adds nothing until the
    first move.
    """
    known: dict[str, Event] = {}
    track: list[Event] = []
    holder: str | None = None
    for event in events:
        if event.kind == "move":
            known[event.who] = event
            carrier = holder
        elif event.what == what:
            holder = _holder_after(event)
            carrier = event.who
        else:
            continue
        if carrier == event.who and carrier in known:
            told = known[carrier]
            if not track or track[-1].place != told.place:
                track.append(told)
    return track


def _where_was_object(events: Sequence[Event], what: str, place: str) -> Solution | None:
    track = object_track(events, what)
    for index in range(len(track) - 1, 0, -1):
        if track[index].place == place:
            here, earlier = track[index], track[index - 1]
            return Solution(earlier.place, (_handling(events, what)[-1].line, here.line, earlier.line))
    return None


def _beside(events: Sequence[Event], side: str, place: str) -> Solution | None:
    """Return what lies on `side` of `place`; "A is north of B" also says that B is south of A."""
    for event in events:
        if event.kind == "beside" and (event.side, event.other) == (side, place):
            return Solution(event.place, (event.line,))
        if event.kind == "beside" and (event.side, event.place) == (OPPOSITE[side], place):
            return Solution(event.other, (event.line,))
    return None


def _beside_what(events: Sequence[Event], side: str, place: str) -> Solution | None:
    return _beside(events, OPPOSITE[side], place)


def _last_give(events: Sequence[Event], asked: str, **named: str) -> Solution | None:
    for event in reversed(events):
        if event.kind == "give" and all(getattr(event, slot) == value for slot, value in named.items()):
            return Solution(getattr(event, asked), (event.line,))
    return None


def _asks_give(asked: str) -> Callable[..., Solution | None]:
    return lambda events, **named: _last_give(events, asked, **named)


def _carrying(events: Sequence[Event], who: str) -> tuple[list[str], tuple[int, ...]]:
    """Return what `who` carries in order of receiving, and the lines that changed it."""
    carried: list[str] = []
    lines: list[int] = []
    for event in events:
        if event.kind == "get" and event.who == who or event.kind == "give" and event.to == who:
            carried.append(event.what)
        elif event.kind in ("drop", "give") and event.who == who and event.what in carried:
            carried.remove(event.what)
        else:
            continue
        lines.append(event.line)
    return carried, tuple(lines)


def _how_many(events: Sequence[Event], who: str) -> Solution | None:
    carried, lines = _carrying(events, who)
    return Solution(COUNT_WORDS[len(carried)], lines) if lines else None


def _what_carried(events: Sequence[Event], who: str) -> Solution | None:
    carried, lines = _carrying(events, who)
    return Solution(",".join(carried) or "nothing", lines) if lines else None


_QUESTIONS: tuple[tuple[re.Pattern[str], Callable[..., Solution | None]], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"Where is (?P<who>[A-Z]\w*)\?", _where_is_person),
        (r"Where is the (?P<what>\w+)\?", _where_is_object),
        (r"Where was the (?P<what>\w+) before the (?P<place>\w+)\?", _where_was_object),
        (r"What is (?P<side>north|south|east|west) of the (?P<place>\w+)\?", _beside),
        (r"What is the (?P<place>\w+) (?P<side>north|south|east|west) of\?", _beside_what),
        (r"What did (?P<who>\w+) give to (?P<to>\w+)\?", _asks_give("what")),
        (r"Who gave the (?P<what>\w+)\?", _asks_give("who")),
        (r"Who gave the (?P<what>\w+) to (?P<to>\w+)\?", _asks_give("who")),
        (r"Who received the (?P<what>\w+)\?", _asks_give("to")),
        (r"Who did (?P<who>\w+) give the (?P<what>\w+) to\?", _asks_give("to")),
        (r"Is (?P<who>\w+) in the (?P<place>\w+)\?", _is_person_there),
        (r"How many objects is (?P<who>\w+) carrying\?", _how_many),
        (r"What is (?P<who>[A-Z]\w*) carrying\?", _what_carried),
    )
)
