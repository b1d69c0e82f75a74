"""The study `lm2-more-tasks`: the arms of `lm2-table1` on tasks whose answer is in no single fact.

Where an object is depends on who took it and on where that person went since (qa2); how many objects a person carries,
and which, on all that were taken, handed on and put down (qa7, qa8). qa1 is there because it teaches to find a fact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from mnemon.studies.lm2_table1 import Lm2Table1
from mnemon.studies.study import Claim, Json, Scale

_TASKS = ("qa1", "qa2", "qa7", "qa8")
_LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k")
_SHOWN = ("1k", "16k", "128k")
"""Lengths at which a report says what every model answers, task by task."""

_ASKED = f"data.tasks=[{', '.join(_TASKS)}]"
_CHANGES = (
    _ASKED,
    # Fewer lengths and more tokens for the first of them: these tasks are learned slowly, on facts alone already.
    "data.lengths=[0, 256, 1024]",
    "data.curriculum.max_stage_tokens=[1500000, 1500000, 1500000, 4000000, 2500000, null]",
)


class Lm2MoreTasks(Lm2Table1):
    """Accuracy on tasks that need two facts, counting or lists, with the paired tests of `lm2-table1`."""

    name = "lm2-more-tasks"
    title = "LM2 and its controls on tasks of several facts"
    scales: ClassVar[Mapping[str, Scale]] = {
        "tiny": Scale(_CHANGES, seeds=3, samples=100, lengths=_LENGTHS),
        "small": Scale(
            ("optimisation.max_minutes=null", _ASKED),
            seeds=3,
            samples=100,
            recipe="babilong-small-lm2",
            lengths=_LENGTHS,
        ),
    }

    def body(self, results: Json) -> list[str]:
        """Say what the tasks ask; then as the parent."""
        asked = (
            "Asked are tasks whose answer is in no single fact: where an object is (qa2: who took it, and where did "
            "that person go since), how many objects somebody carries (qa7) and which (qa8). qa1 is among them because "
            "it teaches to find a fact."
        )
        return [asked, "", *super().body(results)]

    def findings(self, results: Json) -> list[str]:
        """Say how models compare beyond the lengths of training, then what each answers task by task."""
        tasks = results["tasks"]
        found = super().findings(results)
        for length in _SHOWN:
            rows = [row for row in results["rows"] if length in row["cells"]]
            shares = [f"{row['label']} {_shares(row['cells'][length], tasks)}" for row in rows]
            if rows:
                found.append(f"{', '.join(tasks)} in percent at {length}: {'; '.join(shares)}.")
        return found

    def claims(self, results: Json) -> list[Claim]:
        """Return those of the parent, with the tasks they are about."""
        tasks = ", ".join(results["tasks"])
        return [claim._replace(here=f"On {tasks}: {claim.here}") for claim in super().claims(results)]


def _shares(cell: Json, tasks: Sequence[str]) -> str:
    return ", ".join(f"{100 * cell['tasks'][task]['mean']:.0f}" for task in tasks)
