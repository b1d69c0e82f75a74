"""What language models are asked, and how their answers are read.

Activations are put as whole numbers: 0 up to a unit's median, 10 at its largest (see `levels`).
"""

import json
import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mnemon.inspection.explain.explainer import Evidence, ExplainerError, Hypothesis
from mnemon.inspection.trace import Floats

TOP_LEVEL = 10
LONGEST_EXPLANATION = 300
"""Characters."""

_INTRODUCTION = (
    "A unit in the memory of a language model is more active on some tokens of a text than on others. Its activation "
    "is {meaning}."
)
_EXPLAIN = (
    "Below are excerpts of a text, one token per line, with a tab and the unit's activation on the token behind it: 0 "
    "means not active, {top} means as active as ever. Say in one short sentence what the unit is active on: which "
    "tokens, what they have in common, or what stands before them. Answer with that sentence alone."
)
_SIMULATE = (
    "A unit in the memory of a language model is more active on some tokens of a text than on others. From an "
    "explanation of what it is active on, estimate its activation on every token of an excerpt, as a whole number from "
    '0 (not active) to {top} (as active as ever); most are 0. Replace every "unknown" below by your estimate, and '
    "answer with all {count} lines and nothing else: number, token, tab, estimate."
)
_EXAMPLE_PIECES = ("The", " price", " rose", " by", " 12", " percent", " in", " 1998", ".")
_EXAMPLE_LEVELS = (0, 0, 0, 0, 10, 3, 0, 9, 0)
_EXAMPLE_TEXT = "numbers, and less so the units of measure after them"
_ANSWER = "The unit is active on"

_LINE = re.compile(r"^\W*(\d+)\b.*?[\s:=|>,](\d+(?:\.\d+)?)\W*$")
_ARRAY = re.compile(r"\[[\d\s.,]+\]")


def levels(activations: Floats, zero: float, top: float) -> NDArray[np.integer]:
    """Return activations as whole numbers from 0 (at or below `zero`) to 10 (at or above `top`)."""
    scale = TOP_LEVEL / max(top - zero, 1e-12)
    return np.rint(np.clip((activations.astype(np.float64) - zero) * scale, 0, TOP_LEVEL)).astype(np.int64)


def explanation_prompt(evidence: Evidence) -> str:
    """Ask for an explanation, with an invented unit as an example."""
    zero = float(np.median(evidence.activations))
    top = float(max((excerpt.activations.max() for excerpt in evidence.excerpts), default=zero))
    blocks = [
        _INTRODUCTION.format(meaning=evidence.meaning),
        _EXPLAIN.format(top=TOP_LEVEL),
        f"Example unit, excerpt 1:\n{_told(_EXAMPLE_PIECES, _EXAMPLE_LEVELS)}\n{_ANSWER} {_EXAMPLE_TEXT}.",
    ]
    for number, excerpt in enumerate(evidence.excerpts, start=1):
        told = _told(excerpt.tokens, levels(excerpt.activations, zero, top))
        blocks.append(f"The unit, excerpt {number}:\n{told}")
    return "\n\n".join(blocks) + f"\n{_ANSWER}"


def simulation_prompt(hypothesis: Hypothesis, pieces: Sequence[str]) -> str:
    """Ask for the activations on an excerpt, all at once."""
    lines = [f"{number}. {shown(piece)}\tunknown" for number, piece in enumerate(pieces, start=1)]
    example = [
        f"{number}. {shown(piece)}\t{level}"
        for number, (piece, level) in enumerate(zip(_EXAMPLE_PIECES, _EXAMPLE_LEVELS, strict=True), start=1)
    ]
    return "\n\n".join(
        [
            _SIMULATE.format(top=TOP_LEVEL, count=len(pieces)),
            f"Example of an answer, for a unit that is active on {_EXAMPLE_TEXT}:\n" + "\n".join(example),
            f"{_ANSWER}: {hypothesis.text}\nExcerpt:\n" + "\n".join(lines),
        ]
    )


def digit_prompt(hypothesis: Hypothesis) -> str:
    """Begin a text whose next lines are tokens, each with a tab and one digit, 0 to 9: the activation."""
    given = [min(level, 9) for level in _EXAMPLE_LEVELS]
    return (
        f"Activations of units, from 0 (not active) to 9 (as active as ever).\n\n{_ANSWER} {_EXAMPLE_TEXT}.\n"
        f"{_told(_EXAMPLE_PIECES, given)}\n\n{_ANSWER} {hypothesis.text}.\n"
    )


def shown(piece: str) -> str:
    """Return a token on one line, with its spaces visible."""
    return json.dumps(piece, ensure_ascii=False)


def read_explanation(answer: str) -> Hypothesis:
    """Return the explanation in an answer: its first line with words, without what it repeats of the question.

    Raises:
        ExplainerError: there is none.
    """
    for line in answer.splitlines():
        text = re.sub(r"^\W*(?:the unit is active on\b)?[\s:]*", "", line, flags=re.IGNORECASE).strip().rstrip(".")
        if any(character.isalpha() for character in text):
            return Hypothesis(text if len(text) <= LONGEST_EXPLANATION else text[: LONGEST_EXPLANATION - 1] + "…")
    raise ExplainerError(f"the answer holds no explanation: {shown(answer[:60])}")


def read_levels(answer: str, count: int) -> Floats:
    """Return the estimates in an answer to `simulation_prompt`, NaN where one is missing or out of range, [count].

    Numbered lines may come in any order and with any text between number and estimate; a JSON list of `count` numbers
    is understood as well.

    Raises:
        ExplainerError: fewer than half of the estimates are there.
    """
    found = np.full(count, math.nan)
    for line in answer.splitlines():
        if (match := _LINE.match(line)) is not None and 1 <= int(match[1]) <= count:
            found[int(match[1]) - 1] = float(match[2])
    for text in _ARRAY.findall(answer):
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
        if len(numbers) == count:
            found[:] = numbers
    found[found > TOP_LEVEL] = math.nan
    known = int(np.isfinite(found).sum())
    if 2 * known < count:
        raise ExplainerError(f"the answer holds {known} of {count} estimates: {shown(answer[:60])}")
    return found


def _told(pieces: Sequence[str], values: Sequence[int] | NDArray[np.integer]) -> str:
    return "\n".join(f"{shown(piece)}\t{value}" for piece, value in zip(pieces, values, strict=True))
