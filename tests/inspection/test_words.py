"""Words from token ids: what a tokenizer cuts apart is joined, what belongs to no word is left alone."""

from typing import Any

import numpy as np
import pytest

from mnemon.data.tokenizer import train_tokenizer
from mnemon.inspection.words import Words, find_words


def words_of(words: Words) -> list[str]:
    """Return the words in the order of the text."""
    return [words.texts[number] for number in words.number[words.is_last]]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the kitchen the kitchen"] * 3, 275)


def test_pieces_are_joined_to_words_and_signs_stand_alone(tokenizer) -> None:
    text = "the kitchen, the  Kitchenette\n12 cats' café!"
    words = find_words(tokenizer, tokenizer(text).input_ids)
    assert words_of(words) == ["the", "kitchen", ",", "the", "Kitchenette", "12", "cats", "'", "café", "!"]
    assert len(set(words.texts)) == len(words.texts)


def test_every_token_of_a_word_knows_it_and_only_the_last_ends_it(tokenizer) -> None:
    ids = tokenizer(" zebra the").input_ids
    words = find_words(tokenizer, ids)
    zebra = words.number == words.texts.index("zebra")
    assert zebra.sum() > 1
    assert words.is_last[zebra].tolist() == [False] * (zebra.sum() - 1) + [True]
    assert len(words.number) == len(ids)


def test_blanks_are_no_words(tokenizer) -> None:
    words = find_words(tokenizer, tokenizer(" \n \n").input_ids)
    assert words.texts == ()
    assert not words.is_last.any()
    np.testing.assert_array_equal(words.number, -1)


def test_ideographs_stand_alone_where_they_are_tokens() -> None:
    class Characters:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(map(chr, ids))

    words = find_words(Characters(), [ord(character) for character in "ab 書物c"])
    assert words_of(words) == ["ab", "書", "物", "c"]


def test_without_a_tokenizer_ids_are_words() -> None:
    words = find_words(None, [4, 4, 7])
    assert words_of(words) == ["4", "4", "7"]
    assert find_words(None, []).texts == ()
