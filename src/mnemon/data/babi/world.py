"""The little world of bAbI: who is where, who holds what, and what a reader has been told so far.

`World` changes by valid random actions and words them. The story schemes and questions are in
`mnemon.data.babi.generator`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from mnemon.data.babi.story import Asked

OBJECTS = ("apple", "football", "milk")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
PLACES_QA10 = ("bedroom", "cinema", "kitchen", "office", "park", "school")
PERSONS = ("John", "Mary", "Sandra", "Daniel")
PERSONS_QA5 = ("Mary", "Fred", "Bill", "Jeff")
PERSONS_QA10 = ("Bill", "Fred", "Julie", "Mary")

MOVE_VERBS = ("went to", "journeyed to", "travelled to", "moved to", "went back to")
GET_VERBS = ("grabbed", "took", "got", "picked up")
DROP_VERBS = ("dropped", "put down", "left", "discarded")
GIVE_VERBS = ("gave", "passed", "handed")
DROP_THERE_SHARE = 0.2
QA3_GET_THERE_SHARE = 0.19


@dataclass(frozen=True)
class Told:
    """A place a sentence told, and the line it stands in."""

    place: str
    line: int


@dataclass(frozen=True)
class Handling:
    """The last thing that happened to an object: in which line, who did it, who holds it now, what was known then."""

    line: int
    holder: str | None
    told: Told | None


@dataclass(frozen=True)
class Give:
    """One handing over, as qa5 asks about it."""

    line: int
    giver: str
    item: str
    receiver: str


@dataclass
class World:
    """Persons, places and objects with their true state and the reader's knowledge of it.

    Args:
        rng: source of every random choice.
        persons: names of the cast.
        places: names of the places.
        get_there_share: share of get sentences that end in " there".
    """

    rng: random.Random
    persons: tuple[str, ...] = PERSONS
    places: tuple[str, ...] = PLACES
    get_there_share: float = 1.0
    where: dict[str, str] = field(init=False)
    lying: dict[str, str] = field(init=False)
    holder: dict[str, str] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    handled: dict[str, Handling] = field(default_factory=dict)
    ride: dict[str, list[Told]] = field(default_factory=dict)
    touched: dict[str, list[int]] = field(default_factory=dict)
    moves: list[tuple[int, str]] = field(default_factory=list)
    handlings: list[tuple[int, str]] = field(default_factory=list)
    carried: dict[str, list[str]] = field(init=False)
    gives: list[Give] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.where = {person: self.rng.choice(self.places) for person in self.persons}
        self.lying = {item: self.rng.choice(self.places) for item in OBJECTS}
        self.carried = {person: [] for person in self.persons}

    def act(self, actions: tuple[str, ...], line: int) -> str:
        """Do one of `actions` that is possible and return its sentence.

        An action and its arguments are drawn until they fit the state of the world: a random person and, for a move,
        a random place (which may be the one it is in); a get or drop takes one of the objects this person can reach or
        holds; a give takes the first one possible. These weights and orders reproduce the published files.
        """
        while True:
            person, action = self.rng.choice(self.persons), self.rng.choice(actions)
            if action == "move" and (place := self.rng.choice(self.places)) != self.where[person]:
                return self.move(person, place, line)
            if action == "get" and (items := self._within_reach(person)):
                return self._get(person, self.rng.choice(items), line)
            if action == "drop" and self.carried[person]:
                return self._drop(person, self.rng.choice(self.carried[person]), line)
            if action == "give" and (gift := self._first_gift()):
                return self._give(*gift, line)

    def _within_reach(self, person: str) -> list[str]:
        here = self.where[person]
        return [item for item in OBJECTS if item not in self.holder and self.lying[item] == here]

    def _first_gift(self) -> tuple[str, str, str] | None:
        """Return the first possible giver, object and receiver in the order of objects, then of persons."""
        for item in OBJECTS:
            giver = self.holder.get(item)
            for receiver in self.persons:
                if giver is not None and receiver != giver and self.where[receiver] == self.where[giver]:
                    return giver, item, receiver
        return None

    def move(self, person: str, place: str, line: int) -> str:
        """Send a person to a place."""
        self.where[person] = place
        self.told[person] = Told(place, line)
        self.moves.append((line, person))
        for item in self.carried[person]:
            self.ride[item].append(self.told[person])
        return f"{person} {self.rng.choice(MOVE_VERBS)} the {place}."

    def _get(self, person: str, item: str, line: int) -> str:
        self._receive(person, item, line)
        self._touch(person, line)
        self.handlings.append((line, person))
        there = " there" if self.rng.random() < self.get_there_share else ""
        return f"{person} {self.rng.choice(GET_VERBS)} the {item}{there}."

    def _drop(self, person: str, item: str, line: int) -> str:
        self._release(person, item)
        self.lying[item] = self.where[person]
        self.handled[item] = Handling(line, None, self.told.get(person))
        self._touch(person, line)
        self.handlings.append((line, person))
        there = " there" if self.rng.random() < DROP_THERE_SHARE else ""
        return f"{person} {self.rng.choice(DROP_VERBS)} the {item}{there}."

    def _give(self, person: str, item: str, receiver: str, line: int) -> str:
        self._release(person, item)
        self._receive(receiver, item, line)
        self._touch(person, line)
        self._touch(receiver, line)
        self.handlings.append((line, person))
        self.gives.append(Give(line, person, item, receiver))
        return f"{person} {self.rng.choice(GIVE_VERBS)} the {item} to {receiver}."

    def _receive(self, person: str, item: str, line: int) -> None:
        self.holder[item] = person
        self.carried[person].append(item)
        self.handled[item] = Handling(line, person, None)
        self.ride[item] = []

    def _release(self, person: str, item: str) -> None:
        del self.holder[item]
        self.carried[person].remove(item)

    def _touch(self, person: str, line: int) -> None:
        self.touched.setdefault(person, []).append(line)


def ask_place(rng: random.Random, person: str, told: Told, places: tuple[str, ...]) -> Asked:
    """Ask whether a person is in a place: half the time the true one, else any other."""
    yes = rng.random() < 0.5
    place = told.place if yes else rng.choice([other for other in places if other != told.place])
    return f"Is {person} in the {place}?", "yes" if yes else "no", (told.line,)
