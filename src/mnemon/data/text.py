"""Plain text as one stream of token ids, and the held-out windows that perplexity is measured on.

>>> stream = TokenStream(ids=np.arange(7), num_bytes=np.array([3, 1, 4, 1, 5, 9, 0]))
>>> windows = stream.windows(length=3)
>>> print(*windows.ids)
[0 1 2] [3 4 5]
>>> print(*windows.num_bytes)
[3 1 4] [1 5 9]

Documents follow each other in the order of the source, each ended by the tokenizer's end-of-text token. Which documents
are training and which are test text is decided by `mnemon.data.background`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mnemon.data.background import Background
from mnemon.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Token ids with the bytes of text that each stands for.

    Attributes:
        ids: token ids, [N] or, cut into windows, [W, T].
        num_bytes: UTF-8 bytes of text per token, of the same shape; 0 for the end of a document.
    """

    ids: NDArray[Any]
    num_bytes: NDArray[Any]

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, length: int, most: int | None = None) -> TokenStream:
        """Return consecutive windows that share no token, [W, length]; what is left over is dropped.

        Args:
            length: tokens of a window, at least 1.
            most: at most so many windows, from the beginning; None = all.

        Raises:
            DataError: the text is shorter than one window.
        """
        count = self.ids.size // length
        if count < 1:
            raise DataError(
                f"expected at least {length} tokens of text for a window, got {self.ids.size}; use more text"
            )
        count = count if most is None else min(count, most)
        cut = [values.reshape(-1)[: count * length].reshape(count, length) for values in (self.ids, self.num_bytes)]
        return TokenStream(*cut)


@functools.lru_cache(maxsize=4)
def encode_background(background: Background, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Encode all documents of one split of a background; the result is kept and must not be changed.

    Args:
        background: the documents.
        tokenizer: a fast tokenizer with an end-of-text token.

    Returns:
        The stream of all documents, each followed by the end-of-text token.

    Raises:
        ConfigError: the tokenizer has no end-of-text token, or is not a fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.eos_token_id is None:
        raise ConfigError("expected a fast tokenizer with an end-of-text token (eos_token) for text, got another one")
    ids: list[NDArray[np.int32]] = []
    num_bytes: list[NDArray[np.int32]] = []
    for document in background.documents:
        text = " ".join(document.sentences)
        encoding = backend.encode(text, add_special_tokens=False)
        ids.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int32))
        num_bytes.append(np.array([*_bytes_per_token(text, encoding.offsets), 0], dtype=np.int32))
    return TokenStream(np.concatenate(ids), np.concatenate(num_bytes))


def _bytes_per_token(text: str, offsets: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Return how many bytes further each token ends than the one before; the sum is the bytes of the text.

    The end counts, not the span: of a character that several tokens share, the first has all the bytes.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    bytes_per_character = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000).astype(np.int64)
    bytes_before = np.concatenate([[0], np.cumsum(bytes_per_character)])
    ends = np.maximum.accumulate([0, *(end for _, end in offsets)])
    ends[-1] = len(text)
    return np.diff(bytes_before[ends])
