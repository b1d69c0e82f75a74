import collections
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mnemon.data.babi import GENERATED_TASKS, Statement, Story, final_questions, generate, solve
from mnemon.errors import ConfigError


@given(task=st.sampled_from(GENERATED_TASKS), seed=st.integers(0, 2**32), limit=st.integers(0, 8))
def test_final_questions_differ_and_agree_with_the_oracle(task: str, seed: int, limit: int) -> None:
    (story,) = generate(task, 1, seed)
    questions = final_questions(task, story, random.Random(seed), limit)
    assert len(questions) <= limit
    assert len({question.text for question in questions}) == len(questions)
    for question in questions:
        assert question.line == story.lines[-1].line + 1
        assert question.supporting
        assert solve(story, question) == question.answer


def test_every_person_mentioned_can_be_asked_for() -> None:
    story = Story("qa1", (Statement(1, "Mary went to the garden."), Statement(2, "John went to the office.")))
    texts = {question.text for question in final_questions("qa1", story, random.Random(0), 9)}
    assert texts == {"Where is Mary?", "Where is John?"}


def test_the_generator_passed_in_decides() -> None:
    (story,) = generate("qa6", 1, 0)
    first, again = (final_questions("qa6", story, random.Random(4), 3) for _ in range(2))
    assert first == again
    assert any(final_questions("qa6", story, random.Random(seed), 3) != first for seed in range(10))


@pytest.mark.parametrize(
    ("task", "shares"),
    [
        ("qa1", dict.fromkeys(("bathroom", "bedroom", "garden", "hallway", "kitchen", "office"), 1 / 6)),
        ("qa6", {"yes": 0.5, "no": 0.5}),
        ("qa9", {"yes": 0.375, "no": 0.625}),
        ("qa10", {"yes": 0.377, "no": 0.475, "maybe": 0.148}),
    ],
)
def test_answers_have_the_shares_of_the_task(task: str, shares: dict[str, float]) -> None:
    rng = random.Random(0)
    stories = generate(task, 3000, 1)
    drawn = [question.answer for story in stories for question in final_questions(task, story, rng, 1)]
    counts = collections.Counter(drawn)
    expected = [share * len(drawn) for share in shares.values()]
    assert stats.chisquare([counts[answer] for answer in shares], expected).pvalue > 0.001, counts


def test_unknown_tasks_and_negative_limits_are_refused() -> None:
    (story,) = generate("qa1", 1, 0)
    with pytest.raises(ConfigError, match="qa11"):
        final_questions("qa11", story, random.Random(0), 1)
    with pytest.raises(ConfigError, match="-1"):
        final_questions("qa1", story, random.Random(0), -1)
