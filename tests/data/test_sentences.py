import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemon.data.sentences import is_heading, join_paragraphs, split_sentences, text_sentences


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("He came. She went.", ["He came.", "She went."]),
        ("Mr. Darcy came in. He bowed.", ["Mr. Darcy came in.", "He bowed."]),
        ("It was J. Smith, e.g. Smith the elder.", ["It was J. Smith, e.g. Smith the elder."]),
        ('"Who is it?" She rose. "I."', ['"Who is it?"', "She rose.", '"I."']),
        ("Version 3.11 came out. 12 more followed!", ["Version 3.11 came out.", "12 more followed!"]),
        ("no end at all", ["no end at all"]),
        ("", []),
    ],
)
def test_a_sentence_ends_where_a_reader_would_end_it(paragraph: str, sentences: list[str]) -> None:
    assert split_sentences(paragraph) == sentences


@given(st.lists(st.text(alphabet="aB .!?'\"1", min_size=1), max_size=5).map(" ".join))
def test_splitting_loses_nothing_but_spaces(text: str) -> None:
    assert "".join(" ".join(split_sentences(text)).split()) == "".join(text.split())


def test_wrapped_lines_of_a_paragraph_become_one_line() -> None:
    assert list(join_paragraphs(["a wrapped", "  line", "", "", "another"])) == ["a wrapped line", "another"]


def test_titles_and_chapter_headings_are_dropped() -> None:
    book = ["[Emma by Jane Austen 1816]", "", "VOLUME I", "", "CHAPTER I", "", "Emma was", "handsome. She was rich."]
    assert list(text_sentences(book)) == ["Emma was handsome.", "She was rich."]
    assert is_heading("Chapter 12. The Whale")
    assert not is_heading("Call me Ishmael.")
    assert not is_heading("The book lay on the table and nobody took it.")
