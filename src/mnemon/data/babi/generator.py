"""Stories of qa1-qa10: the scheme of each task, its questions, answers and supporting facts.

The distributions were fitted to the public en-10k files (Weston et al. 2015, arXiv 1502.05698) and are compared with
them in the tests.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from mnemon.data.babi.story import GENERATED_TASKS, Question, Statement, Story, check_task
from mnemon.data.babi.world import (
    PERSONS,
    PERSONS_QA5,
    PERSONS_QA10,
    PLACES,
    PLACES_QA10,
    QA3_GET_THERE_SHARE,
    Told,
    World,
)
from mnemon.errors import ConfigError

QUESTIONS_PER_STORY = 5
FRESH_STATEMENTS = 5
EARLIER_LEG_WEIGHT = 0.75
COUNTS = ("none", "one", "two", "three")

Asked = tuple[str, str, tuple[int, ...]]  # question, answer, supporting lines


def generate(task: str, num_stories: int, seed: int) -> list[Story]:
    """Generate stories of one of qa1-qa10.

    Args:
        task: `"qa1"` ... `"qa10"`.
        num_stories: how many stories, at least 0.
        seed: seed of the local random generator; the same seed gives the same stories, and the first stories of a
            longer list are those of a shorter one.

    Returns:
        Stories with five questions each (one in qa4), for example for qa1::

            1 Mary moved to the bathroom.
            2 John went to the hallway.
            3 Where is Mary?        answer "bathroom", supporting (1,)

    Raises:
        ConfigError: the task cannot be generated or the number is negative.
    """
    check_task(task, GENERATED_TASKS)
    if num_stories < 0:
        raise ConfigError(f"expected a number of stories of at least 0, got {num_stories}")
    rng = random.Random(f"babi {task} {seed}")
    return [random_story(task, rng) for _ in range(num_stories)]


def random_story(task: str, rng: random.Random) -> Story:
    """Draw one story of qa1-qa10 from a random generator."""
    return Story(task, _SCHEMES[task](rng))


class _Writer:
    """Collects the lines of one story and numbers them."""

    def __init__(self) -> None:
        self.lines: list[Statement | Question] = []

    @property
    def next_line(self) -> int:
        return len(self.lines) + 1

    @property
    def fresh_since(self) -> int:
        """Line of the oldest statement that counts as fresh."""
        return [line.line for line in self.lines if isinstance(line, Statement)][-FRESH_STATEMENTS:][0]

    def state(self, text: str) -> None:
        self.lines.append(Statement(self.next_line, text))

    def ask(self, asked: Asked) -> None:
        text, answer, supporting = asked
        self.lines.append(Question(self.next_line, text, answer, supporting))

    def finish(self) -> tuple[Statement | Question, ...]:
        return tuple(self.lines)


def _simulate(
    world: World, actions: tuple[str, ...], candidates: Callable[[World, int], list[Asked]]
) -> tuple[Statement | Question, ...]:
    """Alternate two statements and, as soon as there is something fresh to ask, a question.

    `candidates` gets the oldest line that counts as fresh and lists the questions that hang on a fresh statement, one
    entry per statement, so that a subject of several fresh statements is asked more often. So do the published files.
    """
    writer, asked = _Writer(), 0
    while asked < QUESTIONS_PER_STORY:
        for _ in range(2):
            writer.state(world.act(actions, writer.next_line))
        if fresh := candidates(world, writer.fresh_since):
            writer.ask(world.rng.choice(fresh))
            asked += 1
    return writer.finish()


def _qa1(rng: random.Random) -> tuple[Statement | Question, ...]:
    return _simulate(World(rng), ("move",), _where_persons)


def _where_persons(world: World, since: int) -> list[Asked]:
    return [
        (f"Where is {person}?", world.told[person].place, (world.told[person].line,))
        for line, person in world.moves
        if line >= since
    ]


def _qa2(rng: random.Random) -> tuple[Statement | Question, ...]:
    return _simulate(World(rng), ("move", "get", "drop"), _where_objects)


def _where_objects(world: World, since: int) -> list[Asked]:
    """Ask for objects freshly dropped at a known place, or freshly taken and carried on since."""
    asked: list[Asked] = []
    for item, handling in world.handled.items():
        carried_to = world.ride[item][-1] if world.ride[item] else None
        told = carried_to if handling.holder else handling.told
        if told is not None and handling.line >= since:
            asked.append((f"Where is the {item}?", told.place, (handling.line, told.line)))
    return asked


def _qa3(rng: random.Random) -> tuple[Statement | Question, ...]:
    world = World(rng, get_there_share=QA3_GET_THERE_SHARE)
    return _simulate(world, ("move", "get", "drop"), _where_objects_were)


def _where_objects_were(world: World, since: int) -> list[Asked]:
    """Ask for objects freshly taken or dropped whose last carrier moved at least twice with them."""
    asked: list[Asked] = []
    for item, handling in world.handled.items():
        if handling.line < since or len(world.ride[item]) < 2:
            continue
        before, here = _leg(world.rng, world.ride[item])
        support = (handling.line, here.line, before.line)
        asked.append((f"Where was the {item} before the {here.place}?", before.place, support))
    return asked


def _leg(rng: random.Random, ride: list[Told]) -> tuple[Told, Told]:
    """Draw two neighbouring stops of a ride, later ones rather; the second is the last stop at its place."""
    legs = [
        (before, here, EARLIER_LEG_WEIGHT ** (len(ride) - index))
        for index, (before, here) in enumerate(itertools.pairwise(ride), start=2)
        if all(later.place != here.place for later in ride[index:])
    ]
    before, here, _ = rng.choices(legs, weights=[weight for _, _, weight in legs])[0]
    return before, here


def _qa4(rng: random.Random) -> tuple[Statement | Question, ...]:
    row = rng.sample(PLACES, 3)
    ahead, behind = rng.choice((("north", "south"), ("east", "west")))
    pairs = [(row[0], row[1]), (row[1], row[2])]  # the first of a pair lies `ahead` of the second
    rng.shuffle(pairs)
    writer = _Writer()
    for first, second in pairs:
        if rng.random() < 0.5:
            writer.state(f"The {first} is {ahead} of the {second}.")
        else:
            writer.state(f"The {second} is {behind} of the {first}.")
    line = rng.randrange(2)
    first, second = pairs[line]
    asked, answer, side = rng.choice(((first, second, behind), (second, first, ahead)))
    if rng.random() < 0.5:
        writer.ask((f"What is {side} of the {asked}?", answer, (line + 1,)))
    else:
        other = ahead if side == behind else behind
        writer.ask((f"What is the {asked} {other} of?", answer, (line + 1,)))
    return writer.finish()


def _qa5(rng: random.Random) -> tuple[Statement | Question, ...]:
    return _simulate(World(rng, PERSONS_QA5), ("move", "get", "drop", "give"), _last_give)


def _last_give(world: World, since: int) -> list[Asked]:
    if not world.gives or world.gives[-1].line < since:
        return []
    give = world.gives[-1]
    asked = (
        (f"What did {give.giver} give to {give.receiver}?", give.item),
        (f"What did {give.giver} give to {give.receiver}?", give.item),
        (f"Who gave the {give.item}?", give.giver),
        (f"Who gave the {give.item} to {give.receiver}?", give.giver),
        (f"Who received the {give.item}?", give.receiver),
        (f"Who did {give.giver} give the {give.item} to?", give.receiver),
    )
    return [(question, answer, (give.line,)) for question, answer in asked]


def _qa6(rng: random.Random) -> tuple[Statement | Question, ...]:
    return _simulate(World(rng), ("move", "get", "drop"), _are_persons_there)


def _are_persons_there(world: World, since: int) -> list[Asked]:
    return [
        _ask_place(world.rng, person, world.told[person], world.places)
        for line, person in world.moves
        if line >= since
    ]


def _ask_place(rng: random.Random, person: str, told: Told, places: tuple[str, ...]) -> Asked:
    yes = rng.random() < 0.5
    place = told.place if yes else rng.choice([other for other in places if other != told.place])
    return f"Is {person} in the {place}?", "yes" if yes else "no", (told.line,)


def _qa7(rng: random.Random) -> tuple[Statement | Question, ...]:
    return _simulate(World(rng), ("move", "get", "drop", "give"), _how_many_objects)


def _how_many_objects(world: World, since: int) -> list[Asked]:
    return [
        (
            f"How many objects is {person} carrying?",
            COUNTS[len(world.carried[person])],
            tuple(world.touched[person]),
        )
        for line, person in world.handlings
        if line >= since
    ]


def _qa8(rng: random.Random) -> tuple[Statement | Question, ...]:
    return _simulate(World(rng), ("move", "get", "drop"), _what_objects)


def _what_objects(world: World, since: int) -> list[Asked]:
    return [
        (
            f"What is {person} carrying?",
            ",".join(world.carried[person]) or "nothing",
            tuple(world.touched[person]),
        )
        for line, person in world.handlings
        if line >= since
    ]


def _claims(
    rng: random.Random,
    persons: tuple[str, ...],
    places: tuple[str, ...],
    claim: Callable[[World, str], tuple[str, tuple[str, ...], str]],
    answer: Callable[[random.Random, str, tuple[str, ...]], tuple[str, str]],
) -> tuple[Statement | Question, ...]:
    """Write the scheme of qa9 and qa10: half moves, half claims, then a yes-no question about a person's last line."""
    world, writer = World(rng, persons, places), _Writer()
    last: dict[str, tuple[str, tuple[str, ...], int]] = {}
    subjects: list[str] = []
    for _ in range(QUESTIONS_PER_STORY):
        for _ in range(2):
            line = writer.next_line
            person = rng.choice(persons)
            if rng.random() < 0.5:
                kind, told = "in", (rng.choice([place for place in places if place != world.where[person]]),)
                world.where[person] = told[0]
                sentence = f"{person} {rng.choice(('went to', 'journeyed to', 'travelled to', 'moved to', 'went back to'))} the {told[0]}."
            else:
                kind, told, sentence = claim(world, person)
            last[person] = (kind, told, line)
            subjects.append(person)
            writer.state(sentence)
        person = rng.choice(subjects[-FRESH_STATEMENTS:])
        kind, told, line = last[person]
        place, reply = answer(rng, kind, told)
        writer.ask((f"Is {person} in the {place}?", reply, (line,)))
    return writer.finish()


def _qa9(rng: random.Random) -> tuple[Statement | Question, ...]:
    def claim(world: World, person: str) -> tuple[str, tuple[str, ...], str]:
        here = world.where[person]
        if rng.random() < 0.5:
            return "in", (here,), f"{person} is in the {here}."
        place = rng.choice([other for other in PLACES if other != here])
        return "out", (place,), f"{person} is {rng.choice(('not', 'no longer'))} in the {place}."

    def answer(rng: random.Random, kind: str, told: tuple[str, ...]) -> tuple[str, str]:
        if kind == "out":
            return told[0], "no"
        if rng.random() < 0.5:
            return told[0], "yes"
        return rng.choice([place for place in PLACES if place not in told]), "no"

    return _claims(rng, PERSONS, PLACES, claim, answer)


def _qa10(rng: random.Random) -> tuple[Statement | Question, ...]:
    def claim(world: World, person: str) -> tuple[str, tuple[str, ...], str]:
        if rng.random() < 0.5:
            here = world.where[person]
            return "in", (here,), f"{person} is in the {here}."
        first, second = rng.sample(PLACES_QA10, 2)
        return "either", (first, second), f"{person} is either in the {first} or the {second}."

    def answer(rng: random.Random, kind: str, told: tuple[str, ...]) -> tuple[str, str]:
        if rng.random() < (0.58 if kind == "either" else 0.5):
            return rng.choice(told), "maybe" if kind == "either" else "yes"
        return rng.choice([place for place in PLACES_QA10 if place not in told]), "no"

    return _claims(rng, PERSONS_QA10, PLACES_QA10, claim, answer)


_SCHEMES: dict[str, Callable[[random.Random], tuple[Statement | Question, ...]]] = {
    "qa1": _qa1,
    "qa2": _qa2,
    "qa3": _qa3,
    "qa4": _qa4,
    "qa5": _qa5,
    "qa6": _qa6,
    "qa7": _qa7,
    "qa8": _qa8,
    "qa9": _qa9,
    "qa10": _qa10,
}
