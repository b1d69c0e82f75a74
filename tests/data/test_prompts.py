import re

import pytest

from mnemon.data import babi
from mnemon.data.babi import GENERATED_TASKS, TASKS, Question, Statement, Story
from mnemon.data.prompts import TASK_PROMPTS, build_prompt
from mnemon.errors import ConfigError


def test_the_bare_prompt_is_context_and_question() -> None:
    prompt = build_prompt("qa1", "TEXT", "Where is Mary?", instruction=False, examples=False, post_prompt=False)
    assert prompt == "<context>\nTEXT\n</context>\n\nQuestion: Where is Mary?"


@pytest.mark.parametrize("task", TASKS)
def test_the_full_prompt_has_its_parts_in_the_official_order(task: str) -> None:
    prompt = build_prompt(task, "TEXT", "Why?")
    parts = prompt.split("\n\n")
    words = TASK_PROMPTS[task]
    assert parts[0].startswith(words.instruction)
    examples = [f"<example>\n{asked}\nAnswer: {answer}\n</example>" for asked, answer in words.examples]
    assert parts[1:] == [*examples, words.post_prompt, "<context>\nTEXT\n</context>", "Question: Why?"]
    assert 2 <= len(examples) <= 3
    assert prompt == prompt.strip()


@pytest.mark.parametrize("part", ["instruction", "examples", "post_prompt"])
def test_each_part_can_be_left_out(part: str) -> None:
    words = TASK_PROMPTS["qa1"]
    texts = {"instruction": words.instruction, "examples": "<example>", "post_prompt": words.post_prompt}
    prompt = build_prompt("qa1", "TEXT", "Why?", **{part: False})
    assert texts.pop(part) not in prompt
    assert all(text in prompt for text in texts.values())


@pytest.mark.parametrize("task", GENERATED_TASKS)
def test_the_answers_shown_in_the_examples_are_right(task: str) -> None:
    for shown, answer in TASK_PROMPTS[task].examples:
        *facts, question = re.findall(r"[^.?]+[.?]", shown)
        statements = tuple(Statement(line, fact.strip()) for line, fact in enumerate(facts, start=1))
        solved = babi.solve(Story(task, statements), Question(len(facts) + 1, question.strip(), ""))
        assert answer.split()[-1] == solved


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'qa0'; did you mean"):
        build_prompt("qa0", "TEXT", "Why?")
