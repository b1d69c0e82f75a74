"""Stories of qa1-qa10: the scheme of each task, its questions, answers and supporting facts.

The distributions were fitted to the public en-10k files (Weston et al. 2015, arXiv 1502.05698) and are compared with
them in the tests.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from mnemon.data.babi import claims
from mnemon.data.babi.story import (
    GENERATED_TASKS,
    QUESTIONS_PER_STORY,
    Asked,
    Question,
    Statement,
    Story,
    StoryWriter,
    check_task,
)
from mnemon.data.babi.world import PERSONS_QA5, QA3_GET_THERE_SHARE, Told, World, ask_place
from mnemon.errors import ConfigError

EARLIER_LEG_WEIGHT = 0.75
COUNTS = ("none", "one", "two", "three")


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


def _simulate(
    world: World, actions: tuple[str, ...], candidates: Callable[[World, int], list[Asked]]
) -> tuple[Statement | Question, ...]:
    """Alternate two statements and, as soon as there is something fresh to ask, a question.

    `candidates` gets the oldest line that counts as fresh and lists the questions that hang on a fresh statement, one
    entry per statement, so that a subject of several fresh statements is asked more often. So do the published files.
    """
    writer, asked = StoryWriter(), 0
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
        ask_place(world.rng, person, world.told[person], world.places) for line, person in world.moves if line >= since
    ]


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


_SCHEMES: dict[str, Callable[[random.Random], tuple[Statement | Question, ...]]] = {
    "qa1": _qa1,
    "qa2": _qa2,
    "qa3": _qa3,
    "qa4": claims.two_directions,
    "qa5": _qa5,
    "qa6": _qa6,
    "qa7": _qa7,
    "qa8": _qa8,
    "qa9": claims.negations,
    "qa10": claims.alternatives,
}
