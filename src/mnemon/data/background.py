"""Background text that hides the facts: the standard library's prose, a folder of books, or a Hugging Face data set.

A background is a list of documents, each a list of sentences in natural order. Which documents belong to the training
split and which to the test split is fixed, so that the two never share a document.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mnemon.data.sentences import text_sentences
from mnemon.data.stdlib_prose import Document, stdlib_documents
from mnemon.errors import BackendUnavailable, ConfigError, DataError
from mnemon.files import read_text

Split = Literal["train", "test"]
TEST_SHARE = 0.2
HUB_DOCUMENTS = 100  # enough text for 10M tokens without repetition


@dataclass(frozen=True, eq=False)
class Background:
    """The documents of one split of one source."""

    source: str
    split: Split
    documents: tuple[Document, ...]


def load_background(source: str | Path, split: Split, *, encoding: str = "utf-8") -> Background:
    """Load one split of a background text.

    Args:
        source: `"stdlib"` (the English documentation inside the running Python), a folder of `.txt` books (with
            subfolders `train` and `test` if you want to choose; else about a fifth of the books is the test split), or
            `"hf:NAME"` (the first books of a Hugging Face data set with a `text` column, such as `hf:deepmind/pg19`).
        split: `"train"` or `"test"`; the two share no document.
        encoding: how the files of a folder are encoded (`"utf-8"`, `"latin-1"`, ...).

    Raises:
        ConfigError: the source or split is unknown.
        DataError: the folder has no usable text, or a file is damaged (file and line named).
        BackendUnavailable: `hf:` without the `datasets` package or without a network.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"expected the split 'train' or 'test', got {split!r}")
    name = str(source)
    if name == "stdlib":
        return _load_stdlib(split)
    if name.startswith("hf:"):
        return _load_hub(name, split)
    return _load_folder(Path(source), split, encoding)


def _is_in_test(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < TEST_SHARE * 2**32


@functools.cache
def _load_stdlib(split: Split) -> Background:
    documents = tuple(document for document in stdlib_documents() if _is_in_test(document.name) == (split == "test"))
    return Background("stdlib", split, documents)


def read_book(path: Path, encoding: str = "utf-8") -> Document:
    """Read one `.txt` book: wrapped lines joined, headings dropped, sentences in order.

    Raises:
        DataError: the file is missing, empty, undecodable or contains NUL bytes; file and line are named.
    """
    return Document(path.name, tuple(text_sentences(read_text(path, encoding).splitlines())))


def _load_folder(folder: Path, split: Split, encoding: str) -> Background:
    try:
        encoding = codecs.lookup(encoding).name
    except LookupError:
        raise ConfigError(f"expected an encoding such as utf-8 or latin-1, got {encoding!r}") from None
    if not folder.is_dir():
        raise ConfigError(
            f"expected a background 'stdlib', 'hf:NAME' or a folder of .txt files, got {str(folder)!r} (no such folder)"
        )
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        chosen = _books(folder / split)
    else:
        books = _books(folder)
        if len(books) < 2:
            raise DataError(f"{folder}: expected at least 2 .txt files (one per split), got {len(books)}")
        test = _test_names(books)
        chosen = [path for path in books if (path.name in test) == (split == "test")]
    if not chosen:
        raise DataError(f"{folder / split}: expected .txt files, found none")
    return _load_books(folder, split, encoding, tuple((path, path.stat().st_mtime_ns) for path in chosen))


def _books(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".txt")


@functools.lru_cache(maxsize=8)
def _load_books(folder: Path, split: Split, encoding: str, books: tuple[tuple[Path, int], ...]) -> Background:
    """Read the books once; their times of change are part of the key, so that an edited file is read again."""
    documents = tuple(document for path, _ in books if (document := read_book(path, encoding)).sentences)
    if not documents:
        raise DataError(f"{folder}: expected prose in the {split} files ({books[0][0].name} ...), found no sentence")
    return Background(str(folder), split, documents)


def _test_names(paths: list[Path]) -> set[str]:
    """Return the books of the test split: the lowest name hashes, about a fifth of all and at least one."""
    ranked = sorted((path.name for path in paths), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(ranked[: max(1, round(TEST_SHARE * len(ranked)))])


@functools.cache
def _load_hub(source: str, split: Split) -> Background:
    name = source.removeprefix("hf:")
    try:
        import datasets
    except ImportError:
        raise BackendUnavailable(f"{source} needs the package datasets: pip install 'mnemon[hub]'") from None
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True).take(HUB_DOCUMENTS)
        books = [Document(f"{name}/{i}", tuple(text_sentences(row["text"].splitlines()))) for i, row in enumerate(rows)]
    except KeyError:
        raise DataError(f"{source}: expected a data set with a 'text' column") from None
    except Exception as error:  # the hub client raises many types for a missing network, name or split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendUnavailable(f"{source}: cannot load the split {split!r} ({reason})") from None
    return Background(source, split, tuple(book for book in books if book.sentences))
