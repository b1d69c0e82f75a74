"""Questions about the end of a story, so that one long text can be asked about several times in training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from mnemon.data.babi.claims import direction_questions
from mnemon.data.babi.solver import OPPOSITE, Event, answer_from, last_location, object_track, parse
from mnemon.data.babi.story import GENERATED_TASKS, Question, Story, check_task
from mnemon.data.babi.world import PLACES, PLACES_QA10
from mnemon.errors import ConfigError, DataError

EITHER_MAYBE_SHARE = 0.58
CURRENT_PLACE_SHARE = 0.79


def final_questions(task: str, story: Story, rng: random.Random, limit: int) -> list[Question]:
    """Draw different questions about the state at the end of a story.

    Each subject (person, object, form of the question) is asked once, in random order, with the answer shares of the
    task. The story's own questions are ignored.

    Args:
        task: `"qa1"` ... `"qa10"`.
        story: a story of that task, generated or read; all its statements count.
        rng: source of every random choice.
        limit: most questions to return, at least 0.

    Returns:
        At most `limit` questions, answered by the oracle; fewer when the story does not offer more.

    Raises:
        ConfigError: the task is not one of qa1-qa10 or `limit` is negative.
    """
    check_task(task, GENERATED_TASKS)
    if limit < 0:
        raise ConfigError(f"expected a limit of at least 0 questions, got {limit}")
    events = [parse(statement) for statement in story.statements]
    line = story.lines[-1].line + 1
    questions: dict[str, Question] = {}
    for text in _DRAWERS[task](events, rng):
        if len(questions) >= limit:
            break
        if text in questions:
            continue
        try:
            solution = answer_from(events, text)
        except DataError:  # the text does not settle this subject (yet)
            continue
        questions[text] = Question(line, text, solution.answer, solution.supporting)
    return list(questions.values())


def _shuffled(rng: random.Random, items: Sequence[str]) -> list[str]:
    return rng.sample(sorted(set(items)), len(set(items)))


def _persons(events: Sequence[Event], rng: random.Random) -> list[str]:
    return _shuffled(rng, [event.who for event in events] + [event.to for event in events if event.to])


def _each_person(form: str) -> Callable[[Sequence[Event], random.Random], Iterator[str]]:
    def draw(events: Sequence[Event], rng: random.Random) -> Iterator[str]:
        for person in _persons(events, rng):
            yield form.format(person)

    return draw


def _objects(events: Sequence[Event], rng: random.Random) -> list[str]:
    return _shuffled(rng, [event.what for event in events if event.what])


def _where_objects(events: Sequence[Event], rng: random.Random) -> Iterator[str]:
    for item in _objects(events, rng):
        yield f"Where is the {item}?"


def _where_objects_were(events: Sequence[Event], rng: random.Random) -> Iterator[str]:
    for item in _objects(events, rng):
        track = [told.place for told in object_track(events, item)]
        if len(track) < 2:
            continue
        place = track[-1] if rng.random() < CURRENT_PLACE_SHARE else rng.choice(track[1:])
        yield f"Where was the {item} before the {place}?"


def _directions(events: Sequence[Event], rng: random.Random) -> Iterator[str]:
    for event in rng.sample(events, len(events)):
        yield rng.choice(direction_questions(event.other, event.side, OPPOSITE[event.side]))


def _gives(events: Sequence[Event], rng: random.Random) -> Iterator[str]:
    given = [event for event in events if event.kind == "give"]
    if not given:
        return
    last = given[-1]
    forms = [
        f"What did {last.who} give to {last.to}?",
        f"Who gave the {last.what}?",
        f"Who gave the {last.what} to {last.to}?",
        f"Who received the {last.what}?",
        f"Who did {last.who} give the {last.what} to?",
    ]
    first = rng.choice([forms[0], *forms])  # the first form is asked twice as often as each other one
    yield first
    yield from _shuffled(rng, forms)


def _is_there(events: Sequence[Event], rng: random.Random, places: Sequence[str] = PLACES) -> Iterator[str]:
    for person in _persons(events, rng):
        last = last_location(events, person)
        if last is None:
            continue
        wrong = [place for place in places if place not in (last.place, last.other)]
        if last.kind == "either":
            yes = rng.random() < EITHER_MAYBE_SHARE
            right = rng.choice((last.place, last.other))
        else:
            yes = last.kind == "out" or rng.random() < 0.5
            right = last.place
        yield f"Is {person} in the {right if yes else rng.choice(wrong)}?"


def _is_there_qa10(events: Sequence[Event], rng: random.Random) -> Iterator[str]:
    return _is_there(events, rng, PLACES_QA10)


_DRAWERS: dict[str, Callable[[Sequence[Event], random.Random], Iterator[str]]] = {
    "qa1": _each_person("Where is {}?"),
    "qa2": _where_objects,
    "qa3": _where_objects_were,
    "qa4": _directions,
    "qa5": _gives,
    "qa6": _is_there,
    "qa7": _each_person("How many objects is {} carrying?"),
    "qa8": _each_person("What is {} carrying?"),
    "qa9": _is_there,
    "qa10": _is_there_qa10,
}
