"""BABILong samples: the facts of a bAbI story hidden in background text at an exact token count.

Source: "BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack", arXiv 2406.10149.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mnemon.data.babi import GENERATED_TASKS, TASKS, Question, Story, final_questions
from mnemon.data.babi.generator import random_story
from mnemon.data.babi.names import Names, draw_names
from mnemon.data.babi.story import check_task
from mnemon.data.background import Background, Split, load_background
from mnemon.data.haystack import Haystack, haystack_for
from mnemon.data.prompts import build_prompt
from mnemon.data.sample import LENGTHS, Sample, parse_length
from mnemon.data.sample_files import format_json, read_json, write_json
from mnemon.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_FACT = 8
TEST_SHARE = 0.2
MAX_ATTEMPTS = 1000

__all__ = [
    "LENGTHS",
    "Sample",
    "build_prompt",
    "format_json",
    "generate",
    "parse_length",
    "read_json",
    "write_json",
]


def generate(
    task: str,
    length: str | int,
    num_samples: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    background: str | Path | Background = "stdlib",
    split: Split = "test",
    seed: int = 0,
    num_questions: int = 1,
    reserve_tokens: int = 0,
    max_facts: int | None = None,
    share_names: bool = False,
    stories: Sequence[Story] | None = None,
    start: int = 0,
) -> Iterator[Sample]:
    """Generate samples whose text has exactly the asked number of tokens.

    The facts before one question of a story stand in order at uniformly drawn gaps between background sentences of at
    least 10 tokens, themselves in natural order; the last sentence is cut to reach the exact count. Stories of more
    than one fact per 8 tokens of length are not used, nor those whose facts alone are too long. Whether a list of facts
    belongs to training or test is a property of its text, so the two splits share no story under any seeds.

    Args:
        task: `"qa1"` ... `"qa10"`, or any of the twenty when `stories` are given.
        length: nominal length, such as `"4k"` or 4000 tokens; 0 gives the facts only.
        num_samples: how many samples, at least 0.
        tokenizer: a Hugging Face tokenizer; it counts the tokens (no special tokens).
        background: a source for `load_background`, or a background already loaded.
        split: `"train"` or `"test"`, of stories and background.
        seed: sample number i depends on the arguments, the seed and i only.
        num_questions: how many questions about the text in all; those after the first stand in `Sample.questions`.
        reserve_tokens: tokens left free for the prompt: the text has `length - reserve_tokens` tokens.
        max_facts: use only questions with at most this many facts before them; None = any number.
        share_names: tell generated stories of the persons and places of all tasks; otherwise of those of their own.
        stories: take these stories (for example read from a bAbI file) instead of generated ones: each of their
            questions gives one sample, in random order, until they run out.
        start: number of the first sample, to go on where an earlier call stopped.

    Yields:
        Samples with `len(tokenizer(sample.input, add_special_tokens=False).input_ids) == length - reserve_tokens`.

    Raises:
        ConfigError: an argument is unknown or out of range, or no story fits into the length.
        DataError: the background has no sentence that can be used.
    """
    check_task(task, GENERATED_TASKS if stories is None else TASKS)
    tokens = parse_length(length)
    for name, value in (("num_samples", num_samples), ("reserve_tokens", reserve_tokens), ("start", start)):
        if value < 0:
            raise ConfigError(f"expected {name} of at least 0, got {value}")
    if num_questions < 1:
        raise ConfigError(f"expected num_questions of at least 1, got {num_questions}")
    if max_facts is not None and max_facts < 1:
        raise ConfigError(f"expected max_facts of at least 1, got {max_facts}")
    if 0 < tokens <= reserve_tokens:
        raise ConfigError(f"expected reserve_tokens below the length {tokens}, got {reserve_tokens}")
    source = background if isinstance(background, Background) else load_background(background, split)
    maker = _Maker(
        task,
        tokens,
        tokens - reserve_tokens if tokens else 0,
        haystack_for(source, tokenizer),
        num_questions,
        max_facts,
        share_names,
    )
    if stories is None:
        drawn = _generated_pairs(maker, f"{task} {tokens} {split} {seed}", split, start)
    else:
        drawn = _given_pairs(maker, stories, f"{task} {tokens} {split} {seed}", start)
    return (
        maker.make(*pair, f"{split}-{seed}-{start + i}") for i, pair in enumerate(itertools.islice(drawn, num_samples))
    )


Pair = tuple[Story, Question, Names, random.Random]


def split_of(story: Story, question: Question) -> Split:
    """Return the split that the facts before a question belong to: a fifth of all fact lists are test."""
    text = "\n".join(statement.text for statement in story.facts_before(question))
    return "test" if hashlib.sha256(text.encode()).digest()[0] < TEST_SHARE * 256 else "train"


def _generated_pairs(maker: _Maker, name: str, split: Split, start: int) -> Iterator[Pair]:
    for number in itertools.count(start):
        rng = random.Random(f"babilong {name} {number}")
        for _ in range(MAX_ATTEMPTS):
            story = random_story(maker.task, rng)
            question = rng.choice(story.questions)
            names = draw_names(rng) if maker.share_names else Names()
            told = names.in_story(story)
            if split_of(told, question) == split and maker.fits(told, question):
                yield story, question, names, rng
                break
        else:
            raise ConfigError(maker.refusal())


def _given_pairs(maker: _Maker, stories: Sequence[Story], name: str, start: int) -> Iterator[Pair]:
    pairs = [(story, question) for story in stories for question in story.questions if maker.fits(story, question)]
    if not pairs:
        raise ConfigError(f"none of the {len(stories)} stories fits into {maker.target} tokens; use a greater length")
    random.Random(f"babilong order {name}").shuffle(pairs)
    for number, (story, question) in enumerate(pairs[start:], start):
        yield story, question, Names(), random.Random(f"babilong given {name} {number}")


@dataclass(frozen=True)
class _Maker:
    """Turns a story and one of its questions into a sample."""

    task: str
    length: int
    target: int
    haystack: Haystack
    num_questions: int
    max_facts: int | None
    share_names: bool

    def fits(self, story: Story, question: Question) -> bool:
        """Tell whether the facts are few and short enough for the length."""
        facts = story.facts_before(question)
        if self.max_facts is not None and len(facts) > self.max_facts:
            return False
        if self.length == 0:
            return True
        return len(facts) * TOKENS_PER_FACT <= self.length and self.haystack.fact_tokens(facts) <= self.target

    def refusal(self) -> str:
        """Say that no story fits, and what to do."""
        limit = "" if self.max_facts is None else f" with at most {self.max_facts} facts"
        if self.length == 0:
            return f"{self.task} has hardly a story{limit}; allow more facts (in a recipe: data.fact_limits)"
        return f"no story of {self.task}{limit} fits into {self.target} tokens; use a greater length or reserve less"

    def make(self, story: Story, question: Question, names: Names, rng: random.Random, name: str) -> Sample:
        """Hide one story's facts in background text and return the sample.

        Names are exchanged in what is written only: questions are drawn from the story as it is, whose task knows its
        own places alone.
        """
        facts = story.facts_before(question)
        index = {statement.line: position for position, statement in enumerate(facts)}
        texts = [names.in_text(statement.text) for statement in facts]
        text, ids = self.haystack.hide(texts, self.target, rng)
        return Sample(
            task=self.task,
            length=self.length,
            input=text,
            question=names.in_text(question.text),
            target=names.in_text(question.answer),
            questions=self._more_questions(story, question, names, rng),
            facts=tuple(texts),
            supporting=tuple(index[line] for line in question.supporting if line in index),
            input_ids=ids,
            story=name,
        )

    def _more_questions(
        self, story: Story, question: Question, names: Names, rng: random.Random
    ) -> tuple[tuple[str, str], ...]:
        if self.num_questions == 1:
            return ()
        told = Story(self.task, tuple(line for line in story.lines if line.line < question.line))
        more = final_questions(self.task, told, rng, self.num_questions)
        pairs = [
            (names.in_text(other.text), names.in_text(other.answer)) for other in more if other.text != question.text
        ]
        return tuple(pairs[: self.num_questions - 1])
