"""What can be said of a token without a model: itself, what stands before it, what kind of token it is, and where.

>>> pieces = ("Mary", " went", " to", " the", " office", ".", " John")
>>> [feature_values(pieces, name)[4] for name in ("token", "after2", "kind", "place")]
['office', 'to the', 'words in lower case', '5']
>>> feature_values(pieces, nearby("Mary"))
['no', 'yes', 'yes', 'yes', 'yes', 'yes', 'yes']
"""

import functools
from collections.abc import Callable, Sequence

REACH = 8
"""How many tokens a word is near for, after it has occurred."""

_NEARBY = "near "
_LAST_PLACE = 10
_START = "the beginning of the text"
_OPENING = "\"'“‘([{«"


def words(pieces: Sequence[str]) -> list[str]:
    """Return the tokens without the spaces around them; a line break or space alone is named."""
    return [_word(piece) for piece in pieces]


def nearby(word: str) -> str:
    """Name the feature that is "yes" for the `REACH` tokens after a word, else "no"."""
    return _NEARBY + word


def nearby_word(feature: str) -> str | None:
    """Return the word that such a feature is about; None for any other feature."""
    return feature[len(_NEARBY) :] if feature.startswith(_NEARBY) else None


def feature_values(pieces: Sequence[str], feature: str) -> list[str]:
    """Return the value that a feature has for every token.

    Args:
        pieces: texts of the tokens.
        feature: one of `FEATURES`, or what `nearby` names.
    """
    word = nearby_word(feature)
    return list(_all_values(tuple(pieces))[feature]) if word is None else _near(words(pieces), word)


@functools.lru_cache(maxsize=4)  # the same text is asked for once per unit
def _all_values(pieces: tuple[str, ...]) -> dict[str, list[str]]:
    texts = words(pieces)
    kinds = [_kind(piece, text) for piece, text in zip(pieces, texts, strict=True)]
    return {name: function(pieces, texts, kinds) for name, function in _FUNCTIONS.items()}


def _word(piece: str) -> str:
    if piece.strip():
        return piece.strip()
    return "line break" if "\n" in piece else "space"


def _kind(piece: str, text: str) -> str:
    """Say what kind of token it is, by its characters alone."""
    if not piece.strip():
        return "white space"
    if any(character.isdigit() for character in text):
        return "numbers"
    if not any(character.isalpha() for character in text):
        return "punctuation"
    if not piece[0].isspace() and text[0].isalpha() and not text[0].isupper():
        return "parts of words"
    if len(text) > 1 and text.isupper():
        return "words in capitals"
    return "capitalised words" if text.lstrip(_OPENING)[:1].isupper() else "words in lower case"


def _after(count: int) -> Callable[..., list[str]]:
    """Return the function that gives the `count` tokens before a token."""

    def values(pieces: Sequence[str], texts: list[str], kinds: list[str]) -> list[str]:
        return [" ".join(texts[index - count : index]) if index >= count else _START for index in range(len(texts))]

    return values


def _back(count: int) -> Callable[..., list[str]]:
    """Return the function that gives the token `count` places before a token."""

    def values(pieces: Sequence[str], texts: list[str], kinds: list[str]) -> list[str]:
        return [_START] * min(count, len(texts)) + texts[:-count]

    return values


def _places(pieces: Sequence[str], texts: list[str], kinds: list[str]) -> list[str]:
    """Return the number of each token in its sentence, from 1; large numbers are one value."""
    values, place = [], 0
    for piece, text in zip(pieces, texts, strict=True):
        place += 1
        values.append(str(place) if place < _LAST_PLACE else f"{_LAST_PLACE} or later")
        if text.rstrip("\"'”’)]").endswith((".", "!", "?")) or "\n" in piece:
            place = 0
    return values


def _near(texts: list[str], word: str) -> list[str]:
    values, left = [], 0
    for text in texts:
        values.append("yes" if left else "no")
        left = REACH if text == word else max(left - 1, 0)
    return values


_FUNCTIONS: dict[str, Callable[..., list[str]]] = {
    "token": lambda pieces, texts, kinds: texts,
    "kind": lambda pieces, texts, kinds: kinds,
    "place": _places,
    "after1": _after(1),
    "back2": _back(2),
    "back3": _back(3),
    "after2": _after(2),
    "pair": lambda pieces, texts, kinds: [f"{a} {b}" for a, b in zip([_START, *texts[:-1]], texts, strict=True)],
    "after3": _after(3),
}

FEATURES = tuple(_FUNCTIONS)
"""Features with a fixed name, from the simplest to the most special."""
