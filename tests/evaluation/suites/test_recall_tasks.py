"""The recall protocol: prompts, the window around the answer, dropped documents, the score."""

from typing import Any

import pytest

from mnemon.errors import ConfigError
from mnemon.evaluation.harness.recall import contains, cut_documents, cut_window, golds, is_measured, prompt


@pytest.mark.parametrize(
    ("task", "document", "wanted"),
    [
        ("fda", {"text": "\nA lamp. device name:", "key": "device name"}, "A lamp. . Device name:"),
        ("fda", {"text": "A lamp..", "key": "device name"}, "A lamp. Device name:"),
        ("swde", {"text": " A page. \n Summary of information above... x", "key": "director"}, "A page. Director:"),
        ("squad", {"text": " The lamp is in the \n"}, "The lamp is in the"),
        ("nq", {"context": "It is here. where it", "question": " where it "}, "It is here. where it"),
        ("triviaqa", {"context": "[DOC] [PAR]It is here.", "question": "It is"}, "It is here. It is"),
        ("drop", {"context": "Two came.", "question": "The number is"}, "Two came. The number is"),
    ],
)
def test_a_prompt_ends_with_what_the_answer_completes(task: str, document: dict[str, Any], wanted: str) -> None:
    assert prompt(task, document) == wanted


def test_an_answer_is_right_if_it_contains_a_gold_text_whatever_the_case() -> None:
    assert contains("it was ACME ltd, I think", ["nobody", "Acme Ltd"]) == 1
    assert contains("a (b) c", ["(b)"]) == 1
    assert contains("harbour", ["arbo"]) == 1, "words need not be whole"
    assert contains("mill", ["harbour"]) == 0


@pytest.mark.parametrize(
    ("document", "measured"),
    [
        ({"key": "grade", "value": "B"}, False),
        ({"key": "g", "value": "Best"}, False),
        ({"key": "grade", "value": ""}, False),
        ({"key": "grade", "value": "Best"}, True),
        ({"value": ["14", "3"]}, True),
        ({"answers": ["3"]}, False),
        ({"answers": ["14"]}, True),
        ({"answers": []}, False),
    ],
)
def test_documents_with_a_key_or_value_of_one_character_are_dropped(document: dict[str, Any], measured: bool) -> None:
    assert is_measured(document) is measured


class Letters:
    """A tokenizer with one token per character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        return "".join(map(chr, ids))


def test_the_window_starts_half_a_budget_before_the_earliest_answer() -> None:
    text = "." * 100 + "Key" + "." * 50 + "VALUE" + "." * 100
    window, found = cut_window(text, [["value", "key"], ["no"]], Letters(), 40)
    assert found
    assert window == "." * 20 + "Key" + "." * 17
    assert cut_window(text, [["no"], ["value"]], Letters(), 40) == ("." * 20 + "VALUE" + "." * 15, True)
    assert cut_window("Key" + text, [["key"]], Letters(), 40)[0] == ("Key" + text)[:40]
    near_end = "." * 100 + "Key"
    assert cut_window(near_end, [["key"]], Letters(), 40)[0] == "." * 20 + "Key"
    assert cut_window(text, [["absent"]], Letters(), 40) == ("." * 21, False), "then only the last half is read"
    assert cut_window("short", [["absent"]], Letters(), 40) == ("short", True)


def test_dropped_cut_and_lost_documents_are_counted_and_keep_their_numbers() -> None:
    rows = [
        {"text": "x" * 90 + "Acme", "key": "maker", "value": "Acme"},
        {"text": "x", "key": "maker", "value": "A"},
        {"text": "x" * 90, "key": "maker", "value": "Beta", "other": 1},
        {"text": "short", "key": "maker", "value": ["Gamma", "Delta"]},
    ]
    cut = cut_documents("fda", rows, Letters(), context_length=40, answer_length=20)
    assert [document["number"] for document in cut.documents] == [0, 2, 3]
    assert (cut.num_dropped, cut.num_cut, cut.num_not_found) == (1, 2, 1)
    assert cut.documents[0]["text"] == "x" * 10 + "Acme"
    assert cut.documents[2]["golds"] == ["Gamma"]
    assert len(cut_documents("fda", rows, Letters(), limit=2).documents) == 2
    assert golds({"answers": ["a", "b"]}) == ["a", "b"]
    with pytest.raises(ConfigError, match="no room for a text beside an answer of 48"):
        cut_documents("fda", rows, Letters(), context_length=49)
