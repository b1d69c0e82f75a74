"""Two ways of marking a BABILong answer, and what a guess would earn.

`exact_match` compares normalised words and is the rule for models that were trained to answer with the bare word.
`official_match` is the benchmark's own substring rule, kept beside it (defects included) so that numbers can be read
next to the published ones. Neither knows anything about models: `Score` is what the runner stores per prediction.
"""

import re
from dataclasses import dataclass

from mnemon.errors import ConfigError

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")

TASK_LABELS: dict[str, tuple[str, ...]] = {
    "qa1": _PLACES,
    "qa2": _PLACES,
    "qa3": _PLACES,
    "qa4": _PLACES,
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
    "qa6": ("yes", "no"),
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": ("yes", "no"),
    "qa10": ("yes", "no", "maybe"),
    "qa11": _PLACES,
    "qa12": _PLACES,
    "qa13": _PLACES,
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa17": ("yes", "no"),
    "qa18": ("yes", "no"),
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""Every answer a task can have, lower case; the official rule looks for these in the output."""

MAJORITY_LEVEL: dict[str, float] = {
    "qa1": 1 / 6,
    "qa2": 1 / 6,
    "qa3": 1 / 6,
    "qa4": 1 / 6,
    "qa5": 0.185,
    "qa6": 0.501,
    "qa7": 0.487,
    "qa8": 0.362,
    "qa9": 0.625,
    "qa10": 0.475,
}
"""Accuracy of always giving the task's most frequent answer, counted on the bAbI training questions."""

_SET_TASKS = frozenset({"qa8"})
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Score:
    """Both marks of one answer."""

    exact: bool
    official: bool


def score(task: str, question: str, target: str, output: str) -> Score:
    """Mark one output by both rules.

    Args:
        task: "qa1" ... "qa20".
        question: the question asked; the official rule ignores labels it names.
        target: right answer; several items are separated by commas.
        output: what the model wrote after the prompt, special tokens removed.

    Returns:
        The two marks.

    Raises:
        ConfigError: if the task is unknown.
    """
    return Score(exact_match(task, target, output), official_match(task, question, target, output))


def normalise(text: str) -> tuple[str, ...]:
    """Split the first non-empty line of a text into lower-case words, punctuation removed.

    Only the first line counts because a model that was never taught to stop goes on with a next question.
    """
    for line in text.splitlines():
        if words := tuple(_WORD.findall(line.lower())):
            return words
    return ()


def exact_match(task: str, target: str, output: str) -> bool:
    """Tell whether the answer is the target word for word; in qa8 as a set, so that order does not matter.

    Args:
        task: "qa1" ... "qa20".
        target: right answer; several items are separated by commas.
        output: what the model wrote after the prompt.

    Returns:
        True if the normalised words are equal. An empty output is never right.
    """
    _check_task(task)
    wanted, given = normalise(target), normalise(output)
    if task in _SET_TASKS:
        return set(given) - {"and"} == set(wanted)
    return bool(given) and given == wanted


def official_match(task: str, question: str, target: str, output: str) -> bool:
    """Apply the benchmark's rule: the target is the only label that occurs as a substring of the first sentence.

    Known defect, kept on purpose: in qa7 the label "one" is a substring of "none", so an output "none" counts as two
    labels and is marked wrong even where the target is "none" (47 % of the questions). In yes/no tasks "no" also
    matches inside "not" or "know".

    Args:
        task: "qa1" ... "qa20".
        question: labels that it names are never counted.
        target: right answer; with a comma and more than three characters it is a set of items.
        output: what the model wrote after the prompt.

    Returns:
        True if the labels left are exactly the target's.

    Raises:
        ConfigError: if the task is unknown.

    Source:
        BABILong, arXiv:2406.10149, `babilong/metrics.py` of its repository.
    """
    labels = _check_task(task)
    sentence = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    asked = question.lower()
    found = {label for label in labels if label in sentence and label not in asked}
    target = target.lower()
    wanted = set(target.split(",")) if "," in target and len(target) > 3 else {target}
    return found == wanted


def _check_task(task: str) -> tuple[str, ...]:
    if task not in TASK_LABELS:
        raise ConfigError(f"unknown task {task!r}; expected one of qa1 ... qa20")
    return TASK_LABELS[task]
