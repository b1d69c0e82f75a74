"""Hiding sentences in a background at an exact number of tokens of one tokenizer."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mnemon.data.babi import Statement
from mnemon.data.background import Background
from mnemon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_SENTENCE_TOKENS = 10
MAX_CORRECTIONS = 60
NEAR = 12  # characters within which a cut of the exact token count is looked for


@dataclass(frozen=True)
class Piece:
    """A sentence with its leading space, and its token ids."""

    text: str
    ids: tuple[int, ...]


class Haystack:
    """A background in the tokens of one tokenizer; documents are tokenised when they are first used."""

    def __init__(self, background: Background, tokenizer: PreTrainedTokenizerBase) -> None:
        self._background = background
        self._tokenizer = tokenizer
        self._weights = list(itertools.accumulate(len(document.sentences) for document in background.documents))
        self._pieces: dict[int, list[Piece]] = {}
        self._facts: dict[str, Piece] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def fact_tokens(self, facts: Iterable[Statement]) -> int:
        """Return how many tokens the facts take, each with its leading space."""
        return sum(len(self._fact(fact.text).ids) for fact in facts)

    def hide(self, facts: Sequence[str], target: int, rng: random.Random) -> tuple[str, tuple[int, ...]]:
        """Return a text of exactly `target` tokens that holds the facts in order, and its token ids.

        Args:
            facts: sentences to hide, in order; together at most `target` tokens.
            target: number of tokens of the whole text; 0 gives the facts alone, whatever their length.
            rng: source of every random choice.
        """
        needles = [self._fact(fact) for fact in facts]
        if target == 0:
            text = " ".join(facts)
            return text, tuple(self.encode([text])[0])
        places = sorted(rng.random() for _ in needles)
        room = target - sum(len(needle.ids) for needle in needles)
        hay = self._draw(room + MIN_SENTENCE_TOKENS, rng)
        for _ in range(MAX_CORRECTIONS):
            text = "".join(piece.text for piece in _mix(needles, self._cut(hay, room, rng), places)).strip()
            ids = self.encode([text])[0]
            if len(ids) == target:
                return text, tuple(ids)
            room += target - len(ids)  # the first sentence lost its space, or the tokenizer merges across sentences
        raise DataError(f"cannot reach exactly {target} tokens with this tokenizer and the background {self._name}")

    @property
    def _name(self) -> str:
        return f"{self._background.source} ({self._background.split})"

    def _fact(self, text: str) -> Piece:
        if text not in self._facts:
            self._facts[text] = self._piece(f" {text}")
        return self._facts[text]

    def _piece(self, text: str) -> Piece:
        return Piece(text, tuple(self.encode([text])[0]))

    def _document(self, number: int) -> list[Piece]:
        if number not in self._pieces:
            texts = [f" {sentence}" for sentence in self._background.documents[number].sentences]
            pieces = [Piece(text, tuple(ids)) for text, ids in zip(texts, self.encode(texts), strict=True)]
            self._pieces[number] = [piece for piece in pieces if len(piece.ids) >= MIN_SENTENCE_TOKENS]
        return self._pieces[number]

    def _random_document(self, rng: random.Random) -> list[Piece]:
        """Return a document drawn in proportion to its number of sentences."""
        numbers = range(len(self._background.documents))
        for _ in range(100):
            if pieces := self._document(rng.choices(numbers, cum_weights=self._weights)[0]):
                return pieces
        raise DataError(f"{self._name}: expected sentences of at least {MIN_SENTENCE_TOKENS} tokens, found none")

    def _draw(self, room: int, rng: random.Random) -> list[Piece]:
        """Return sentences in natural order that together have at least `room` tokens."""
        hay: list[Piece] = []
        while room > 0:
            document = self._random_document(rng)
            for piece in itertools.islice(document, rng.randrange(len(document)), None):
                hay.append(piece)
                room -= len(piece.ids)
                if room <= 0:
                    break
        return hay

    def _cut(self, hay: Sequence[Piece], room: int, rng: random.Random) -> list[Piece]:
        """Return the first sentences of `hay` with exactly `room` tokens, the last one cut."""
        kept: list[Piece] = []
        for piece in hay:
            if len(piece.ids) >= room:
                return [*kept, self._beginning(piece, room, rng)] if room > 0 else kept
            kept.append(piece)
            room -= len(piece.ids)
        return [*kept, *self._cut(self._draw(room, rng), room, rng)] if room > 0 else kept

    def _beginning(self, piece: Piece, count: int, rng: random.Random) -> Piece:
        """Return the beginning of a sentence with exactly `count` tokens, of another sentence where this has none."""
        text = piece.text
        for attempt in range(MAX_CORRECTIONS):
            if cut := self._prefix(text, count):
                return cut
            document = self._random_document(rng)
            text = rng.choice([other for other in document if len(other.ids) >= count] or document).text
            if attempt > MAX_CORRECTIONS // 2:  # writing with several tokens per character: begin inside the sentence
                words = text.split(" ")
                text = " " + " ".join(words[rng.randrange(1, len(words)) :])
        raise DataError(f"{self._name}: cannot cut a sentence to exactly {count} tokens with this tokenizer")

    def _prefix(self, text: str, count: int) -> Piece | None:
        """Return the beginning of a text with exactly `count` tokens, if cutting somewhere near gives it."""
        end = self._end_of_token(text, count)
        for distance in range(NEAR):
            for position in (end - distance, end + distance):
                cut = text[: max(position, 0)]
                if cut.strip() and cut == cut.rstrip() and len(ids := self.encode([cut])[0]) == count:
                    return Piece(cut, tuple(ids))
        return None

    def _end_of_token(self, text: str, count: int) -> int:
        """Return about how many characters the first `count` tokens cover."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return len(text) * count // max(1, len(self.encode([text])[0]))
        offsets = backend.encode(text, add_special_tokens=False).offsets
        return int(offsets[min(count, len(offsets)) - 1][1])


def _mix(needles: Sequence[Piece], hay: Sequence[Piece], places: Sequence[float]) -> list[Piece]:
    """Return hay and needles in reading order; a place in [0, 1) names one of the gaps before, between and after."""
    mixed: list[Piece] = []
    done = 0
    for needle, place in zip(needles, places, strict=True):
        gap = int(place * (len(hay) + 1))
        mixed.extend(hay[done:gap])
        mixed.append(needle)
        done = gap
    return [*mixed, *hay[done:]]


@functools.lru_cache(maxsize=8)
def haystack_for(background: Background, tokenizer: PreTrainedTokenizerBase) -> Haystack:
    """Return the haystack of a background and a tokenizer, kept so that nothing is tokenised twice."""
    return Haystack(background, tokenizer)
