"""The English prose that every Python installation carries: topic help and docstrings, gathered without importing."""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mnemon.data.sentences import join_paragraphs, split_sentences
from mnemon.errors import BackendUnavailable

SHORTEST_SENTENCE, LONGEST_SENTENCE = 5, 80  # words
MIN_LETTERS = 0.85  # share of letters and spaces in a sentence of prose
MIN_DOCUMENT = 3  # sentences
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "turtledemo", "ensurepip"}
    | {"__pycache__", "lib-dynload"}
)


@dataclass(frozen=True)
class Document:
    """One book, module or topic: its sentences in natural order, none of them cut."""

    name: str
    sentences: tuple[str, ...]


@functools.cache
def stdlib_documents() -> tuple[Document, ...]:
    """Gather the prose of the topic help and of all docstrings, one document per topic or module, without importing."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents = []
    for name, text in sorted(_stdlib_texts(root)):
        sentences = [sentence for sentence in _prose_sentences(text) if sentence not in seen]
        seen.update(sentences)
        if len(sentences) >= MIN_DOCUMENT:
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
                match key, value:
                    case ast.Constant(str(topic)), ast.Constant(str(text)):
                        yield f"{name}:{topic}", text


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, also of nested and conditional ones."""
    match node:
        case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            yield ast.get_docstring(node) or ""
    for block in ("body", "orelse", "handlers", "finalbody"):
        inner = getattr(node, block, ())
        for child in inner if isinstance(inner, list) else ():  # a lambda's body is no list
            yield from _docstrings(child)


_PROSE = re.compile(r"[\"'(]?[A-Z][\x20-\x7e]*[.!?][\"')]*")


def _prose_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a documentation text that are plain English prose."""
    for paragraph in join_paragraphs(text.splitlines()):
        if ">>>" in paragraph or "::=" in paragraph:
            continue
        plain = " ".join(paragraph.replace("*", "").replace("``", '"').split())
        for sentence in split_sentences(plain):
            letters = sum(character.isalpha() or character == " " for character in sentence)
            words = len(sentence.split())
            if (
                SHORTEST_SENTENCE <= words <= LONGEST_SENTENCE
                and letters >= MIN_LETTERS * len(sentence)
                and _PROSE.fullmatch(sentence)
            ):
                yield sentence
