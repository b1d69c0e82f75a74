"""Words of a text that is given as token ids, whatever the tokenizer cuts them into."""

import itertools
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mnemon.inspection.trace import Integers

_INCOMPLETE = "\ufffd"


class Words(NamedTuple):
    """Which word every token belongs to.

    Attributes:
        texts: the different words.
        number: which of them every token belongs to, [T]; -1 for a token that is nothing but blanks.
        is_last: whether a token is the last of its word, the first that has seen all of it, [T].
    """

    texts: tuple[str, ...]
    number: Integers
    is_last: np.ndarray


def find_words(tokenizer: Any, ids: Sequence[int]) -> Words:
    """Join tokens to words by what they decode to.

    A token goes on with the word before it where a letter or digit follows a letter or digit without a blank between
    them, and where it completes a character whose bytes were cut apart. Signs of punctuation stand alone, and so do the
    tokens of scripts that write ideographs.

    Args:
        tokenizer: whose `decode` says what ids mean; None = every id is a word of its own.
        ids: token ids.
    """
    values = [int(token) for token in ids]
    starts = list(range(len(values))) if tokenizer is None else _word_starts(tokenizer, values)
    number = np.full(len(values), -1, dtype=np.int64)
    is_last = np.zeros(len(values), dtype=bool)
    known: dict[str, int] = {}
    texts: dict[tuple[int, ...], str] = {}
    for start, stop in itertools.pairwise([*starts, len(values)]):
        tokens = tuple(values[start:stop])
        if tokens not in texts:
            texts[tokens] = str(tokens[0]) if tokenizer is None else _decode(tokenizer, tokens).strip()
        if text := texts[tokens]:
            number[start:stop] = known.setdefault(text, len(known))
            is_last[stop - 1] = True
    return Words(tuple(known), number, is_last)


def _word_starts(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the first token of every word."""
    begins: dict[tuple[int, int], bool] = {}
    starts = [0] if ids else []
    for place in range(1, len(ids)):
        pair = (ids[place - 1], ids[place])
        if pair not in begins:
            before, both = _decode(tokenizer, pair[:1]), _decode(tokenizer, pair)
            begins[pair] = both.startswith(before) and not _goes_on(before, both[len(before) :])
        if begins[pair]:
            starts.append(place)
    return starts


def _goes_on(before: str, text: str) -> bool:
    """Say whether a text goes on with a word that stands at the end of the text before it."""
    if not before or not text:
        return not text
    return _joins(before[-1]) and _joins(text[0])


def _joins(character: str) -> bool:
    is_letter = character.isalnum() and unicodedata.east_asian_width(character) not in "WF"
    return is_letter or character == _INCOMPLETE


def _decode(tokenizer: Any, ids: tuple[int, ...]) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text
