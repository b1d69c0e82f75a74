"""Background text that hides the facts: the standard library's prose, a folder of books, or a Hugging Face data set.

A background is a list of documents, each a list of sentences in natural order. Which documents belong to the training
split and which to the test split is fixed, so that the two never share a document.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mnemon.data.babi.reader import read_text_lines
from mnemon.errors import BackendUnavailable, ConfigError, DataError

Split = Literal["train", "test"]
TEST_SHARE = 0.2
MIN_WORDS = 5
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "turtledemo", "ensurepip"}
    | {"__pycache__", "lib-dynload"}
)


@dataclass(frozen=True)
class Document:
    """One book, module or topic: its sentences in natural order, none of them cut."""

    name: str
    sentences: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Background:
    """The documents of one split of one source."""

    source: str
    split: Split
    documents: tuple[Document, ...]


def load_background(source: str | Path, split: Split, *, encoding: str = "utf-8") -> Background:
    """Load one split of a background text.

    Args:
        source: `"stdlib"` (the English documentation inside the running Python), a folder of `.txt` books, or
            `"hf:NAME"` (a Hugging Face data set with a `text` column, such as `hf:deepmind/pg19`).
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


# --- sentences -------------------------------------------------------------------------------------------------------

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr st no vs etc e.g i.e cf al fig vol pp p esq capt col gen lieut messrs mme mlle rev hon jr sr".split()
)
_END = re.compile(r"([.!?]+[\"'”’)\]]*)\s+(?=[\"'“‘(\[]*[A-Z0-9])")


def split_sentences(paragraph: str) -> list[str]:
    """Split one paragraph of English prose into sentences.

    A sentence ends at `.`, `!` or `?` (and closing quotes) before a space and a capital letter or digit, unless the
    word before the point is an abbreviation or a single initial.
    """
    sentences: list[str] = []
    start = 0
    for found in _END.finditer(paragraph):
        word = paragraph[start : found.start()].rsplit(None, 1)[-1:]
        last = word[0].lstrip("\"'“‘([").lower() if word else ""
        if found.group(1) == "." and (last in _ABBREVIATIONS or len(last) == 1 and last.isalpha() and last != "i"):
            continue
        sentences.append(paragraph[start : found.end(1)])
        start = found.end()
    tail = paragraph[start:].strip()
    return [*sentences, tail] if tail else sentences


def join_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Join the wrapped lines of each paragraph (a run of non-blank lines) with single spaces."""
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.extend(line.split())
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield " ".join(paragraph)


def _is_in_test(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < TEST_SHARE * 2**32


# --- the standard library --------------------------------------------------------------------------------------------


@functools.cache
def _stdlib_documents() -> tuple[Document, ...]:
    """Gather the prose of the topic help and of all docstrings, one document per topic or module, without importing."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents = []
    for name, text in sorted(_stdlib_texts(root)):
        sentences = [sentence for sentence in _prose_sentences(text) if sentence not in seen]
        seen.update(sentences)
        if len(sentences) >= 3:
            documents.append(Document(name, tuple(sentences)))
    if not documents:
        raise BackendUnavailable(f"{root}: expected Python's own documentation, found none; use a folder of .txt books")
    return tuple(documents)


def _stdlib_texts(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts) or parts[0].startswith("config-"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):  # a vendored file of another encoding or syntax: no prose for us
            continue
        name = "/".join(parts)
        if parts[0] == "pydoc_data":
            yield from _topic_texts(name, tree)
        else:
            yield name, "\n\n".join(_docstrings(tree))


def _topic_texts(name: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield f"{name}:{key.value}", value.value


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node)):
            yield text


_PROSE = re.compile(r"[\"'(]?[A-Z][\x20-\x7e]*[.!?][\"')]*")


def _prose_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a documentation text that are plain English prose."""
    for paragraph in join_paragraphs(text.splitlines()):
        if ">>>" in paragraph or "::=" in paragraph:
            continue
        for sentence in split_sentences(paragraph.replace("**", "").replace("*", "").replace("``", '"')):
            letters = sum(character.isalpha() or character == " " for character in sentence)
            words = len(sentence.split())
            if MIN_WORDS <= words <= 80 and letters >= 0.85 * len(sentence) and _PROSE.fullmatch(sentence):
                yield sentence


@functools.cache
def _load_stdlib(split: Split) -> Background:
    documents = tuple(document for document in _stdlib_documents() if _is_in_test(document.name) == (split == "test"))
    return Background("stdlib", split, documents)


# --- books -----------------------------------------------------------------------------------------------------------


def read_book(path: Path, encoding: str = "utf-8") -> Document:
    """Read one `.txt` book: wrapped lines joined, headings dropped, sentences in order.

    Raises:
        DataError: the file is missing, empty, undecodable or contains NUL bytes; file and line are named.
    """
    sentences: list[str] = []
    for paragraph in join_paragraphs(read_text_lines(path, encoding)):
        if not _is_heading(paragraph):
            sentences.extend(split_sentences(paragraph))
    return Document(path.name, tuple(sentences))


def _is_heading(paragraph: str) -> bool:
    """Tell whether a paragraph is a title or chapter line: bracketed, all capitals, or short without a full stop."""
    if paragraph.startswith("[") and paragraph.endswith("]"):
        return True
    if re.match(r"(chapter|volume|book|part|act|scene)\b.{0,60}$", paragraph, re.IGNORECASE):
        return True
    return paragraph.upper() == paragraph or len(paragraph.split()) < MIN_WORDS and paragraph[-1:] not in ".!?\"'"


def _load_folder(folder: Path, split: Split, encoding: str) -> Background:
    if not folder.is_dir():
        raise ConfigError(
            f"expected a background 'stdlib', 'hf:NAME' or a folder of .txt files, got {str(folder)!r} (no such folder)"
        )
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".txt")
    if len(paths) < 2:
        raise DataError(f"{folder}: expected at least 2 .txt files (one per split), got {len(paths)}")
    test = _test_names(paths)
    chosen = [path for path in paths if (path.name in test) == (split == "test")]
    return _load_books(folder, split, encoding, tuple((path, path.stat().st_mtime_ns) for path in chosen))


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


# --- Hugging Face data sets ------------------------------------------------------------------------------------------

HUB_DOCUMENTS = 100


@functools.cache
def _load_hub(source: str, split: Split) -> Background:
    name = source.removeprefix("hf:")
    try:
        import datasets
    except ImportError:
        raise BackendUnavailable(f"{source} needs the 'datasets' package: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True).take(HUB_DOCUMENTS)
        texts = [str(row["text"]) for row in rows]
    except KeyError:
        raise DataError(f"{source}: expected a data set with a 'text' column") from None
    except Exception as error:  # the hub client raises many types for a missing network, name or split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendUnavailable(f"{source}: cannot load the split {split!r} ({reason})") from None
    documents = []
    for number, text in enumerate(texts):
        sentences: list[str] = []
        for paragraph in join_paragraphs(text.splitlines()):
            if not _is_heading(paragraph):
                sentences.extend(split_sentences(paragraph))
        documents.append(Document(f"{name}/{split}/{number}", tuple(sentences)))
    return Background(source, split, tuple(document for document in documents if document.sentences))
