"""One BABILong sample, and the names of the lengths it comes in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mnemon.errors import ConfigError

LENGTHS: dict[str, int] = {
    "0k": 0,
    **{f"{2**power}k": 2**power * 1000 for power in range(10)},
    "1M": 1_000_000,
    "10M": 10_000_000,
}


def parse_length(length: str | int) -> int:
    """Return a length in tokens: `"4k"` is 4000, `"1M"` is 1000000, a number is itself.

    Raises:
        ConfigError: the text is no length or the number is negative.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*", str(length))
    factor = {"": 1, "k": 1000, "m": 1_000_000}[found.group(2).lower()] if found else 1
    tokens = float(found.group(1)) * factor if found else 0.5
    if not tokens.is_integer():
        raise ConfigError(f"expected a length such as {', '.join(LENGTHS)} or a number of tokens, got {length!r}")
    return int(tokens)


@dataclass(frozen=True)
class Sample:
    """One text with hidden facts, one question about it and its answer.

    A sample of qa1 at 0k (no background)::

        input     "Mary moved to the bathroom. John went to the hallway."
        question  "Where is Mary?"
        target    "bathroom"

    Args:
        task: `"qa1"` ...
        length: nominal length in tokens (0 for facts only).
        input: the text, without the question.
        question: the question.
        target: the bAbI answer.
        questions: further pairs of question and answer about the same text, for training.
        facts: the hidden sentences in order.
        supporting: indices into `facts` of the sentences the answer rests on.
        input_ids: the token ids of `input` under the tokenizer it was made with.
        story: a name of the story, unique within split and seed.
    """

    task: str
    length: int
    input: str
    question: str
    target: str
    questions: tuple[tuple[str, str], ...] = ()
    facts: tuple[str, ...] = ()
    supporting: tuple[int, ...] = ()
    input_ids: tuple[int, ...] = field(default=(), repr=False, compare=False)
    story: str = ""
