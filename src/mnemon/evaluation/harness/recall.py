"""The recall-intensive tasks as they are measured for linear models: prompts, the cut to 2K tokens, the score.

    {"text": "... Applicant: Acme Ltd. ...", "key": "applicant", "value": "Acme Ltd"}           FDA, SWDE, SQuAD
    {"context": "... built in 1889 ...", "question": "The tower was built in", "answers": ["1889"]}   NQ, TriviaQA, DROP

The harness itself has prompts for three of the six that differ from these, and cuts no window.

Source:
    Just read twice, arXiv:2407.05483 (tasks and score); MoM, arXiv:2502.13685 (context of 2048 tokens).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnemon.errors import ConfigError

CONTEXT_LENGTH, ANSWER_LENGTH = 2048, 48

Document = Mapping[str, Any]

_SUMMARY = "Summary of information above..."
_MARKS = re.compile(r"\[(?:PAR|DOC|TLE)\]")
_QUESTION_TASKS = ("nq", "triviaqa", "drop")


def text_column(task: str) -> str:
    """Give the column that holds the text, which is what gets cut."""
    return "context" if task in _QUESTION_TASKS else "text"


def prompt(task: str, document: Document) -> str:
    """Write what the model reads: the text, and the beginning of a sentence that the answer completes.

    Args:
        task: `fda`, `swde`, `squad`, `nq`, `triviaqa` or `drop`.
        document: a row of the data set, cut or not.
    """
    text = str(document[text_column(task)])
    if task == "squad":
        return text.strip()
    if task in _QUESTION_TASKS:
        question = str(document["question"]).strip()
        text = _MARKS.sub("", text.strip()) if task == "triviaqa" else text.strip()
        return f"{_without_endings(text, question).strip().strip('.')}. {question}"
    key = str(document["key"])
    if task == "swde":
        text = text.split(_SUMMARY)[0]
    text = _without_endings(text, f"{key}:")
    text = text.strip("\n").strip(".") if task == "fda" else text.strip().strip(".")
    return f"{text}. {key[0].upper()}{key[1:]}:"


def golds(document: Document) -> list[str]:
    """Give the texts of which one must occur in the answer: the value, or else the answers."""
    answers = document.get("answers")
    return [_first(document["value"]) or ""] if answers is None else [str(answer) for answer in answers]


def contains(output: str, wanted: Sequence[str]) -> float:
    """Mark an answer: 1 if any of the wanted texts occurs in it, upper and lower case alike, else 0.

    Nothing is normalised and words need not be whole, so that a short gold text is found by accident now and then.
    """
    return float(any(_find(text, output) >= 0 for text in wanted))


def is_measured(document: Document) -> bool:
    """Tell whether the protocol measures a document: its key and value, where it has them, exceed one character.

    Where there is no value, the first answer stands for it. This drops the one-digit answers of DROP, for instance.
    """
    key, value = _first(document.get("key")), _first(document.get("value"))
    if value is None:
        value = _first(document.get("answers")) or ""
    return all(len(text.strip()) > 1 for text in (key, value) if text is not None)


@dataclass(frozen=True)
class CutDocuments:
    """Documents ready to be asked about.

    Attributes:
        documents: what is left: the columns of the prompt, `golds`, and under `number` the row's place in the data.
        num_dropped: how many the protocol does not measure.
        num_cut: how many lost a part of their text.
        num_not_found: how many of these do not hold the answer literally, so that the window is the end of the text.
    """

    documents: tuple[dict[str, Any], ...]
    num_dropped: int
    num_cut: int
    num_not_found: int


def cut_documents(
    task: str,
    rows: Iterable[Document],
    tokenizer: Any,
    *,
    context_length: int = CONTEXT_LENGTH,
    answer_length: int = ANSWER_LENGTH,
    limit: int | None = None,
) -> CutDocuments:
    """Drop what is not measured, and cut every text to a window around its answer.

    Args:
        task: name of the task.
        rows: the data set.
        tokenizer: of the model; tokens are counted with it.
        context_length: tokens of prompt and answer together.
        answer_length: tokens kept free for the answer.
        limit: most documents to keep; None for all.

    Raises:
        ConfigError: there is no room for a text.
    """
    budget = context_length - answer_length
    if budget < 2:
        raise ConfigError(
            f"a context of {context_length} tokens has no room for a text beside an answer of {answer_length}; "
            "raise --context-length"
        )
    kept: list[dict[str, Any]] = []
    num_dropped = num_cut = num_missed = 0
    column = text_column(task)
    for number, row in enumerate(rows):
        if limit is not None and len(kept) >= limit:
            break
        if not is_measured(row):
            num_dropped += 1
            continue
        text, found = cut_window(str(row[column]), _needles(row), tokenizer, budget)
        was_cut = text != str(row[column])
        num_cut += was_cut
        num_missed += was_cut and not found
        others = {name: row[name] for name in ("key", "question") if name in row}
        kept.append({"number": number, column: text, **others, "golds": golds(row)})
    return CutDocuments(tuple(kept), num_dropped, num_cut, num_missed)


def cut_window(text: str, needles: Sequence[Sequence[str]], tokenizer: Any, budget: int) -> tuple[str, bool]:
    """Cut a text to a window of tokens around the earliest of some texts in it.

    With p the tokens before that place, the window is [max(0, p - budget / 2), p + what is left of the budget). A text
    that fits is returned as it is.

    Args:
        text: what to cut.
        needles: groups of texts; the first group of which anything occurs, whatever the case, decides the place.
        tokenizer: counts the tokens.
        budget: tokens of the window, at least 2.

    Returns:
        The window, decoded, and whether any needle was found. If none was, the window ends with the text.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= budget:
        return text, True
    place = _place(text, needles)
    before = tokenizer(text[:place] if place >= 0 else text[:-1], add_special_tokens=False)["input_ids"]
    start = max(0, len(before) - budget // 2)
    end = min(len(ids), start + budget)
    window: str = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
    return window, place >= 0


def _place(text: str, needles: Sequence[Sequence[str]]) -> int:
    for group in needles:
        places = [place for place in (_find(needle, text) for needle in group) if place >= 0]
        if places:
            return min(places)
    return -1


def _find(needle: str, text: str) -> int:
    """Give the place of the first occurrence, whatever the case; -1 if there is none."""
    found = re.search(re.escape(needle), text, re.IGNORECASE)
    return -1 if found is None else found.start()


def _needles(row: Document) -> list[list[str]]:
    """Give key and value first, then the other answers."""
    named = [text for name in ("key", "value") if (text := _first(row.get(name)))]
    others = [str(text) for name in ("answers", "alt_answers") for text in (row.get(name) or ()) if text]
    return [named, others]


def _first(value: Any) -> str | None:
    """Give a text, or the first of a list of them."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    return None if value is None else str(value)


def _without_endings(text: str, ending: str) -> str:
    """Take copies of an ending off a text, whatever the case."""
    while ending and text.lower().endswith(ending.lower()):
        text = text[: -len(ending)]
    return text
