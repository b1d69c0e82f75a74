"""Token ids of a text of any size, equal to those of tokenising all of it at once, in constant memory.

A tokenizer cannot be fed piece by piece: what a token is depends on what follows and, at the beginning of a piece, on
what came before. So windows of the text that overlap are tokenised one after another:

    window 1   |---------------------------------------|
    window 2                                 |---------------------------------------|
                                       margin |  match  | margin

In the middle of the overlap, away from both edges, the two must have the very same tokens at the very same places;
there they are joined. If they differ (a run of a thousand digits, a word longer than the overlap) the overlap is
doubled, at last to both windows together. Where windows begin depends on the text alone and never on how it arrives, so
the tokens do neither.

Tokens are independent of what is far away for every tokenizer we know, and then the result is exact. A stretch of more
than `LONGEST_WINDOW` characters without a place to join (a single endless word) is cut there, and `forced_cuts` counts
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mnemon.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW, OVERLAP, LONGEST_WINDOW = 2**15, 2**11, 2**18
"""Characters of a window, that two windows share, and of the longest window."""
_FEWEST_TOKENS = 8  # that must agree


class _Token(NamedTuple):
    id: int
    start: int
    end: int


class TokenStream:
    """Cuts texts into tokens.

    Args:
        tokenizer: a fast tokenizer of Hugging Face.
        window: characters of a window.
        overlap: characters that two windows share.
        longest_window: characters of the longest window.

    Attributes:
        forced_cuts: places where a text had to be cut without two windows agreeing.

    Raises:
        ConfigError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        window: int = WINDOW,
        overlap: int = OVERLAP,
        longest_window: int = LONGEST_WINDOW,
    ) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"expected a fast tokenizer, got {type(tokenizer).__name__}; convert it with the library that made it"
            )
        self._backend = _plain(backend)
        self._window, self._overlap, self._longest = window, overlap, longest_window
        self.forced_cuts = 0

    def tokens(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of a text, without special tokens around it, in lists of any length.

        Args:
            pieces: the text, cut anywhere.
        """
        source = _Text(pieces)
        begin, size = 0, self._window  # of the running window, in characters of the text
        tokens, is_last = self._window_tokens(source, begin, size)
        done = 0  # tokens of the running window that have been passed on
        while not is_last:
            edge = begin + size
            overlap = self._overlap
            place = None
            while overlap < size:
                # Every following window brings the same amount of new text.
                length = self._window - self._overlap + overlap
                following, is_last = self._window_tokens(source, edge - overlap, length)
                place = _place_to_join(tokens, following, edge - overlap, edge)
                if place is not None and place[0] >= done:
                    break
                place, overlap = None, 2 * overlap
            if place is not None:
                yield [token.id for token in tokens[done : place[0]]]
                begin, size = edge - overlap, length
                tokens, done = following, place[1]
                source.forget_before(begin)
            elif size + self._window <= self._longest:
                size += self._window
                tokens, is_last = self._window_tokens(source, begin, size)
            else:
                self.forced_cuts += 1
                yield [token.id for token in tokens[done:]]
                begin, size, done = edge, self._window, 0
                source.forget_before(begin)
                tokens, is_last = self._window_tokens(source, begin, size)
        yield [token.id for token in tokens[done:]]

    def _window_tokens(self, source: _Text, begin: int, size: int) -> tuple[list[_Token], bool]:
        """Return the tokens of a window, placed in the text, and whether the text ends in it."""
        text, is_last = source.between(begin, begin + size)
        encoding = self._backend.encode(text, add_special_tokens=False)
        placed = zip(encoding.ids, encoding.offsets, strict=True)
        return [_Token(number, begin + start, begin + end) for number, (start, end) in placed], is_last


def beginning_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer puts in front of every text, such as the beginning-of-text token."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    dressed = list(tokenizer("a")["input_ids"])
    for place in range(len(dressed) - len(plain) + 1):
        if dressed[place : place + len(plain)] == plain:
            return dressed[:place]
    return []


class _Text:
    """The part of a text that is still needed.

    Args:
        pieces: the text, cut anywhere.
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._held = ""
        self._first = 0  # place in the text of the first character held

    def between(self, begin: int, end: int) -> tuple[str, bool]:
        """Return the characters from `begin` to `end`, and whether nothing comes after them."""
        parts, length = [self._held], self._first + len(self._held)
        while length <= end:  # one more than needed tells whether the text goes on
            piece = next(self._pieces, None)
            if piece is None:
                break
            parts.append(piece)
            length += len(piece)
        self._held = "".join(parts)
        return self._held[begin - self._first : end - self._first], length <= end

    def forget_before(self, place: int) -> None:
        """Let go of what stands before a place."""
        if 2 * (place - self._first) > len(self._held):  # seldom, where all of a long text is held
            self._held = self._held[place - self._first :]
            self._first = place


def _place_to_join(tokens: list[_Token], following: list[_Token], begin: int, end: int) -> tuple[int, int] | None:
    """Find where two windows that share the text from `begin` to `end` can be joined.

    Returns:
        The number of tokens to take from the first window, and to leave out of the second; None if their tokens
        differ between the margins, a quarter of the overlap each.
    """
    margin = (end - begin) // 4
    mine = _within(tokens, begin + margin, end - margin)
    theirs = _within(following, begin + margin, end - margin)
    if len(mine) < _FEWEST_TOKENS or tokens[mine.start : mine.stop] != following[theirs.start : theirs.stop]:
        return None
    half = len(mine) // 2
    return mine.start + half, theirs.start + half


def _within(tokens: list[_Token], begin: int, end: int) -> range:
    """Return the numbers of the tokens that lie between two places."""
    first = next((number for number, token in enumerate(tokens) if token.start >= begin), len(tokens))
    last = next((number for number in range(len(tokens), first, -1) if tokens[number - 1].end <= end), first)
    return range(first, last)


def _plain(backend: Any) -> Any:
    """Return a tokenizer that neither cuts off nor pads; the given one is left as it is."""
    if backend.truncation is None and backend.padding is None:
        return backend
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
