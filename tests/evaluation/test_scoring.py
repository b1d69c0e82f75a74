import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemon.errors import ConfigError
from mnemon.evaluation.scoring import MAJORITY_LEVEL, TASK_LABELS, exact_match, normalise, official_match, score


@pytest.mark.parametrize("output", [" office", "Office.", "OFFICE\n\nQuestion: Where is Mary?", "\n office"])
def test_case_punctuation_and_following_lines_do_not_matter(output: str) -> None:
    assert exact_match("qa1", "office", output)


@pytest.mark.parametrize("output", ["", "   ", "offices", "the office", "kitchen office", "garden\noffice"])
def test_anything_but_the_bare_word_is_wrong_by_the_exact_rule(output: str) -> None:
    assert not exact_match("qa1", "office", output)


@pytest.mark.parametrize("output", ["milk,apple", "apple, milk", "apple and milk", "Milk, and apple."])
def test_lists_are_compared_as_sets(output: str) -> None:
    assert exact_match("qa8", "apple,milk", output)
    assert not exact_match("qa8", "apple,milk,football", output)
    assert not exact_match("qa8", "apple", output)


def test_an_empty_list_answer_is_wrong() -> None:
    assert not exact_match("qa8", "nothing", "")
    assert exact_match("qa8", "nothing", "nothing")


def test_paths_keep_their_order() -> None:
    assert exact_match("qa19", "e,n", "e, n")
    assert not exact_match("qa19", "e,n", "n,e")


def test_the_official_rule_marks_every_correct_none_of_qa7_as_wrong() -> None:
    question = "How many objects is Mary carrying?"
    assert not official_match("qa7", question, "none", "none")
    assert exact_match("qa7", "none", "none")
    assert official_match("qa7", question, "one", "one")
    assert official_match("qa7", question, "two", "two")


def test_the_official_rule_takes_the_first_sentence_and_one_label_only() -> None:
    question = "Where is Mary?"
    assert official_match("qa1", question, "office", "The most recent location of Mary is office. Before: kitchen")
    assert not official_match("qa1", question, "office", "office or kitchen")
    assert official_match("qa1", question, "office", "office <context> kitchen")
    assert official_match("qa1", question, "office", "office <example> kitchen")


def test_the_official_rule_ignores_labels_named_in_the_question() -> None:
    question = "What is north of the kitchen?"
    assert official_match("qa4", question, "garden", "North of the kitchen is the garden")
    assert not official_match("qa4", question, "garden", "The kitchen")


def test_the_official_rule_sees_no_inside_other_words() -> None:
    assert not official_match("qa6", "Is Mary in the office?", "yes", "yes, I know")


def test_the_official_rule_compares_several_items_as_a_set() -> None:
    question = "What is Mary carrying?"
    assert official_match("qa8", question, "apple,milk", "milk and apple")
    assert not official_match("qa8", question, "apple,milk", "milk")
    assert official_match("qa19", "How do you go from the kitchen to the office?", "e,n", "e,n")
    assert not official_match("qa19", "How do you go from the kitchen to the office?", "e,n", "e, n")


@given(st.sampled_from(sorted(TASK_LABELS)), st.data())
def test_a_target_given_back_is_right_by_the_exact_rule(task: str, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(TASK_LABELS[task]))
    marks = score(task, "?", target, f" {target.title()}.")
    assert marks.exact
    assert marks.official == (target != "none")


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    words = normalise(text)
    assert normalise(" ".join(words)) == words


def test_an_unknown_task_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="qa99"):
        score("qa99", "?", "yes", "yes")


def test_every_level_is_at_least_uniform_chance() -> None:
    for task, level in MAJORITY_LEVEL.items():
        if task != "qa8":  # qa8 also has answers of several items, so its labels are not its answers
            assert 1 / len(TASK_LABELS[task]) <= level + 1e-9
