import doctest
from typing import Any

import numpy as np
import pytest

from mnemon.data import text
from mnemon.data.background import Background
from mnemon.data.stdlib_prose import Document
from mnemon.data.text import TokenStream, encode_background
from mnemon.data.tokenizer import train_tokenizer
from mnemon.errors import ConfigError, DataError

DOCUMENTS = (
    Document("a", ("The sea was calm.", "Nobody spoke.")),
    Document("b", ("Ein Käse für 3 €, naïve 🙂 Leute.", "Ende.")),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["The sea was calm. Nobody spoke."] * 3, 290)


def test_the_example_in_the_module_runs() -> None:
    result = doctest.testmod(text)
    assert (result.failed, result.attempted) == (0, 4)


def test_every_document_comes_back_and_ends_with_the_end_token(tokenizer: Any) -> None:
    stream = encode_background(Background("made up", "test", DOCUMENTS), tokenizer)
    ends = np.flatnonzero(stream.ids == tokenizer.eos_token_id)
    assert len(ends) == 2
    assert ends[-1] == len(stream) - 1
    for document, part in zip(DOCUMENTS, np.split(stream.ids, ends[:1] + 1), strict=True):
        assert tokenizer.decode(part[:-1]) == " ".join(document.sentences)


def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer: Any) -> None:
    stream = encode_background(Background("made up", "test", DOCUMENTS), tokenizer)
    ends = np.flatnonzero(stream.ids == tokenizer.eos_token_id)
    assert (stream.num_bytes[ends] == 0).all()
    for document, part in zip(DOCUMENTS, np.split(stream.num_bytes, ends[:1] + 1), strict=True):
        assert part.sum() == len(" ".join(document.sentences).encode())
        assert (part >= 0).all()
    ascii_ids = stream.ids[: ends[0]]
    assert list(stream.num_bytes[: ends[0]]) == [len(tokenizer.decode([token])) for token in ascii_ids]


def test_windows_share_no_token_and_drop_the_rest() -> None:
    stream = TokenStream(np.arange(11), np.ones(11, dtype=int))
    assert stream.windows(4).ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert stream.windows(4, most=1).ids.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(DataError, match="at least 12 tokens of text for a window, got 11"):
        stream.windows(12)


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="end-of-text token"):
        encode_background(Background("made up", "test", DOCUMENTS), bare)
