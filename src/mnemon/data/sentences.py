"""From wrapped prose to sentences: a small splitter for English text that needs no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

SHORTEST_PARAGRAPH = 5  # words; shorter ones without a full stop are headings
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


def text_sentences(lines: Iterable[str]) -> Iterator[str]:
    """Yield the sentences of a book's lines in order, without titles and chapter headings."""
    for paragraph in join_paragraphs(lines):
        if not is_heading(paragraph):
            yield from split_sentences(paragraph)


def is_heading(paragraph: str) -> bool:
    """Tell whether a paragraph is a title or chapter line: bracketed, all capitals, or short without a full stop."""
    if paragraph.startswith("[") and paragraph.endswith("]"):
        return True
    if re.match(r"(chapter|volume|book|part|act|scene)\b.{0,60}$", paragraph, re.IGNORECASE):
        return True
    return (
        paragraph.upper() == paragraph or len(paragraph.split()) < SHORTEST_PARAGRAPH and paragraph[-1:] not in ".!?\"'"
    )
