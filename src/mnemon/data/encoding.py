"""Token ids and labels of BABILong samples in the short layout, for training and evaluation.

<context>
... Mary moved to the bathroom. ...
</context>

Question: Where is Mary?
Answer: bathroom<eos>

Question: Where is John?
Answer: hallway<eos>
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mnemon.data.prompts import build_prompt
from mnemon.data.sample import Sample
from mnemon.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


def evaluation_prompt(sample: Sample, layout: Literal["short", "official"] = "short") -> str:
    """Return the text a model is to continue with the answer.

    Args:
        sample: the sample.
        layout: `"short"` ends in `Answer:` (see `training_example`); `"official"` is the full BABILong prompt.

    Raises:
        ConfigError: the layout is unknown.
    """
    if layout == "official":
        return build_prompt(sample.task, sample.input, sample.question)
    if layout != "short":
        raise ConfigError(f"expected the layout 'short' or 'official', got {layout!r}")
    bare = build_prompt(
        sample.task, sample.input, sample.question, instruction=False, examples=False, post_prompt=False
    )
    return f"{bare}\nAnswer:"


def training_example(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_questions: int = 1,
    loss_on: Literal["answers", "all"] = "answers",
) -> tuple[list[int], list[int]]:
    """Return the token ids and labels of a sample in the short layout.

    Args:
        sample: the sample; its further `questions` follow the first one.
        tokenizer: tokenizer with an end-of-text token.
        max_questions: most questions to ask, at least 1.
        loss_on: `"answers"` keeps labels on the answers and their end tokens, `"all"` on every token.

    Returns:
        `input_ids` and `labels` of equal length; labels are not shifted, ignored positions hold -100.

    Raises:
        ConfigError: an option is out of range or the tokenizer has no end-of-text token.
    """
    if max_questions < 1 or loss_on not in ("answers", "all"):
        raise ConfigError(
            f"expected max_questions >= 1 and loss_on 'answers' or 'all', got {max_questions} and {loss_on!r}"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError("expected a tokenizer with an end-of-text token (eos_token), got one without")
    ids: list[int] = []
    labels: list[int] = []
    asked = _encode_prompt(sample, tokenizer)
    for number, (question, answer) in enumerate(((sample.question, sample.target), *sample.questions)):
        if number == max_questions:
            break
        if number > 0:
            asked = list(_encode_short(tokenizer, f"\n\nQuestion: {question}\nAnswer:"))
        answered = [*_encode_short(tokenizer, f" {answer}"), tokenizer.eos_token_id]
        ids += asked + answered
        labels += (asked if loss_on == "all" else [IGNORED] * len(asked)) + answered
    return ids, labels


def fact_columns(sample: Sample, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bool]:
    """Say which tokens of a sample's text belong to its facts.

    Args:
        sample: the sample.
        tokenizer: its tokenizer.
        ids: token ids that hold the text, as `training_example` returns them.

    Returns:
        A mark per token.

    Raises:
        ConfigError: the tokenizer joins tokens of a fact with those of its neighbours.
    """
    marks, after = [False] * len(ids), 0
    for fact in sample.facts:
        found = (_find(ids, _encode_short(tokenizer, text), after) for text in (f" {fact}", fact))
        span = min((span for span in found if span is not None), default=None)
        if span is None:
            raise ConfigError(f"this tokenizer has no tokens of {fact!r} alone; use loss_on 'answers' or 'all'")
        start, after = span
        marks[start:after] = [True] * (after - start)
    return marks


def _find(ids: Sequence[int], wanted: Sequence[int], after: int) -> tuple[int, int] | None:
    """Return where a piece first stands at or behind a place."""
    size = len(wanted)
    for start in range(after, len(ids) - size + 1):
        if ids[start] == wanted[0] and tuple(ids[start : start + size]) == tuple(wanted):
            return start, start + size
    return None


def _encode_prompt(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode the short prompt, taking over the ids of the sample's text where that gives the same."""
    prompt = evaluation_prompt(sample)
    if not sample.input_ids or not _splits_at_line_ends(tokenizer):
        return _encode(tokenizer, prompt)
    before, _, after = prompt.partition(sample.input)
    return [*_encode_short(tokenizer, before), *sample.input_ids, *_encode_short(tokenizer, after)]


@functools.lru_cache(maxsize=8)
def _splits_at_line_ends(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a text between two line ends keeps its tokens; some join a full stop and a line end."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return False
    before, after = "<context>\n", "\n</context>\n\nQuestion:"
    alone = [_encode(tokenizer, before), _encode(tokenizer, after)]
    return all(
        _encode(tokenizer, before + text + after) == [*alone[0], *_encode(tokenizer, text), *alone[1]]
        for text in (f"{first}{last}" for first in _BEGINNINGS for last in _ENDS)
    )


_BEGINNINGS = ("The", "a", "7", "(", '"', "'", "É", "-")
_ENDS = (" end", " 7", ".", ",", "?", "!", ")", '"', "'", ":", ";", "-", ">", "/", "é", "x's")


@functools.lru_cache(maxsize=4096)
def _encode_short(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Encode an answer or question; there are few different ones."""
    return tuple(_encode(tokenizer, text))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(backend.encode(text, add_special_tokens=False).ids)
