"""A text of little stories, and units planted in it: what each is active on is known."""

import functools
import re

import numpy as np
import pytest

from mnemon.data.babi import generate
from mnemon.inspection.explain.activations import Unit, UnitActivations

NAMES = {"Mary", "John", "Sandra", "Daniel"}
PIECE = re.compile(r"\s?\w+|[^\w\s]")


@functools.lru_cache
def story_pieces(stories: int = 60) -> tuple[str, ...]:
    """Cut stories into words with the space before them, and points."""
    told = generate("qa1", stories, seed=0)
    text = "".join(f" {statement.text}" for story in told for statement in story.statements)
    return tuple(PIECE.findall(text))


def planted_values(pieces: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the activations of every planted unit."""
    numbers = np.random.default_rng(0)
    words = [piece.strip() for piece in pieces]
    is_name = np.array([word in NAMES for word in words])
    follows = np.array([words[max(index - 3, 0) : index] == ["went", "to", "the"] for index in range(len(words))])
    begins = np.array([index == 0 or words[index - 1] == "." for index in range(len(words))])
    noise = numbers.normal(scale=0.02, size=(3, len(words)))
    return {
        "names": 0.1 + 0.6 * is_name + noise[0],
        "after went to the": 0.8 * follows + noise[1],
        "first words": 0.5 * begins + noise[2],
        "random": numbers.normal(size=len(words)),
        "constant": np.full(len(words), 0.25),
    }


@pytest.fixture(scope="session")
def planted() -> UnitActivations:
    """Five units on about 2400 tokens: names, places after "went to the", first words, noise, nothing."""
    pieces = story_pieces()
    values = planted_values(pieces)
    return UnitActivations(
        model="planted",
        kind="read",
        units=tuple(Unit(name, 0, index) for index, name in enumerate(values)),
        pieces=pieces,
        ids=np.arange(len(pieces), dtype=np.int32) % 50,
        values=np.stack(list(values.values()), axis=1).astype(np.float16),
    )
