"""Stories of qa4, qa9 and qa10: nobody carries anything, sentences only claim where places and persons are."""

from __future__ import annotations

import random
from collections.abc import Callable

from mnemon.data.babi.story import FRESH_STATEMENTS, QUESTIONS_PER_STORY, Asked, Question, Statement, StoryWriter
from mnemon.data.babi.world import MOVE_VERBS, PERSONS, PERSONS_QA10, PLACES, PLACES_QA10, Told, ask_place

END_NAMED_FIRST_SHARE = 2 / 3

Lines = tuple[Statement | Question, ...]
Claim = Callable[[random.Random, str, str, str, int], tuple[str, Callable[[random.Random], Asked]]]


def two_directions(rng: random.Random) -> Lines:
    """Write a qa4 story: three places in a row, a line about each pair of neighbours, one question."""
    first, middle, last = rng.sample(PLACES, 3)
    ahead, behind = rng.choice((("north", "south"), ("east", "west")))
    pairs = [(first, ahead, behind), (last, behind, ahead)]  # an end, its side of the middle, the side opposite
    rng.shuffle(pairs)
    writer, questions = StoryWriter(), []
    for end, side, opposite in pairs:
        if rng.random() < END_NAMED_FIRST_SHARE:
            named, other, where, back = end, middle, side, opposite
        else:
            named, other, where, back = middle, end, opposite, side
        questions += [(text, named, (writer.next_line,)) for text in direction_questions(other, where, back)]
        writer.state(f"The {named} is {where} of the {other}.")
    writer.ask(rng.choice(questions))
    return writer.finish()


def direction_questions(other: str, side: str, opposite: str) -> tuple[str, str]:
    """Return the two questions about "A is SIDE of OTHER" whose answer is A."""
    return f"What is {side} of the {other}?", f"What is the {other} {opposite} of?"


def negations(rng: random.Random) -> Lines:
    """Write a qa9 story: moves, "is in the", "is not in the" and "is no longer in the"."""
    return _claims(rng, PERSONS, PLACES, _negation)


def alternatives(rng: random.Random) -> Lines:
    """Write a qa10 story: moves, "is in the" and "is either in the ... or the ..."."""
    return _claims(rng, PERSONS_QA10, PLACES_QA10, _alternative)


def _claims(rng: random.Random, persons: tuple[str, ...], places: tuple[str, ...], claim: Claim) -> Lines:
    """Send a random person to another place with every line, and tell of it by a move, plainly or by a vague claim."""
    where = {person: rng.choice(places) for person in persons}
    writer = StoryWriter()
    subjects: list[str] = []
    ask: dict[str, Callable[[random.Random], Asked]] = {}
    for _ in range(QUESTIONS_PER_STORY):
        for _ in range(2):
            person, line = rng.choice(persons), writer.next_line
            left = where[person]
            where[person] = rng.choice([place for place in places if place != left])
            sentence, ask[person] = _tell(rng, person, left, where[person], line, places, claim)
            writer.state(sentence)
            subjects.append(person)
        writer.ask(ask[rng.choice(subjects[-FRESH_STATEMENTS:])](rng))
    return writer.finish()


def _tell(
    rng: random.Random, person: str, left: str, here: str, line: int, places: tuple[str, ...], claim: Claim
) -> tuple[str, Callable[[random.Random], Asked]]:
    form = rng.choice(("move", "move", "plain", "vague"))
    if form == "vague":
        return claim(rng, person, left, here, line)
    sentence = f"{person} {rng.choice(MOVE_VERBS) if form == 'move' else 'is in'} the {here}."
    return sentence, lambda rng: ask_place(rng, person, Told(here, line), places)


def _negation(
    rng: random.Random, person: str, left: str, here: str, line: int
) -> tuple[str, Callable[[random.Random], Asked]]:
    """Tell only which place a person left; a question then names that place."""
    sentence = f"{person} is {rng.choice(('not', 'no longer'))} in the {left}."
    return sentence, lambda rng: (f"Is {person} in the {left}?", "no", (line,))


def _alternative(
    rng: random.Random, person: str, left: str, here: str, line: int
) -> tuple[str, Callable[[random.Random], Asked]]:
    """Name the true place and any other in random order; a question names the true place half the time."""
    named = [here, rng.choice(PLACES_QA10)]  # the other may be the same, as it is in a sixth of the published lines
    rng.shuffle(named)

    def ask(rng: random.Random) -> Asked:
        text, _, support = ask_place(rng, person, Told(here, line), PLACES_QA10)
        return text, "maybe" if any(text.endswith(f" the {place}?") for place in named) else "no", support

    return f"{person} is either in the {named[0]} or the {named[1]}.", ask
