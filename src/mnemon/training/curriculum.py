"""Curriculum by achievement: the context grows when the current length is answered well, not after a fixed time.

A stage is a context length, or one with few facts. The share of rightly answered questions is taken from the training
batches themselves: every sample is new, so what the model answers before it learns from a batch is an unbiased measure.
`Curriculum` is plain Python whose state is one JSON value, so that a resumed run continues exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mnemon.errors import CheckpointError
from mnemon.training.data_sections import CurriculumSection, Stage

LEARNED = "learned"
"""Why a stage ended whose texts were answered well enough."""


@dataclass(frozen=True)
class StageRecord:
    """How one stage ended.

    Attributes:
        length: context length in tokens.
        max_facts: most facts (or pairs) in a context, None = any number.
        tokens: tokens trained on during the stage (shorter lengths that were mixed in included).
        accuracy: running accuracy when it ended, by task.
        reason: `learned` or `max_stage_tokens`.
    """

    length: int
    max_facts: int | None
    tokens: int
    accuracy: dict[str, float]
    reason: str


class Curriculum:
    """Stage counter that advances when the running answer accuracy of the current length reaches the threshold."""

    def __init__(self, stages: Sequence[Stage], tasks: list[str], options: CurriculumSection) -> None:
        self.stages = [Stage(*stage) for stage in stages]
        self.tasks = list(tasks)
        self.options = options
        self.stage = options.start_stage
        self.stage_tokens = 0
        self.learned_all = False
        self.history: list[StageRecord] = []
        self._recent: dict[str, deque[int]] = {}
        self._forget()

    @property
    def length(self) -> int:
        """Return the context length of the current stage in tokens."""
        return self.stages[self.stage].length

    @property
    def accuracy(self) -> dict[str, float]:
        """Return the running accuracy by task at the current length (only tasks that were asked)."""
        return {task: sum(seen) / len(seen) for task, seen in self._recent.items() if seen}

    def observe(self, stage: int, answers: Iterable[tuple[str, bool]], tokens: int) -> bool:
        """Take in what one batch showed.

        Args:
            stage: number of the stage the batch was drawn from.
            answers: (task, whether every answer token was right) per question.
            tokens: tokens of the batch.

        Returns:
            Whether the stage advanced.
        """
        self.stage_tokens += tokens
        if stage == self.stage:
            for task, right in answers:
                self._recent[task].append(int(right))
        if self.stage_tokens < self.options.min_stage_tokens:
            return False
        if self._is_learned():
            return self._advance(LEARNED)
        cap = self.options.most_tokens(self.stage)
        return self._advance("max_stage_tokens") if cap is not None and self.stage_tokens >= cap else False

    def state(self) -> dict[str, Any]:
        """Return everything the curriculum knows as a JSON value."""
        return {
            "stages": [[stage.length, stage.max_facts, list(stage.tasks)] for stage in self.stages],
            "tasks": self.tasks,
            "stage": self.stage,
            "stage_tokens": self.stage_tokens,
            "learned_all": self.learned_all,
            "recent": {task: list(seen) for task, seen in self._recent.items()},
            "history": [asdict(record) for record in self.history],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned.

        Args:
            state: value of `state()` of a curriculum with the same stages and tasks.

        Raises:
            CheckpointError: the stages or tasks differ.
        """
        if any(state[key] != self.state()[key] for key in ("stages", "tasks")):
            raise CheckpointError("the checkpoint's curriculum has other stages or tasks than the recipe")
        self.stage, self.stage_tokens = state["stage"], state["stage_tokens"]
        self.learned_all = state["learned_all"]
        self.history = [StageRecord(**record) for record in state["history"]]
        self._recent = {task: deque(seen, maxlen=self.options.window) for task, seen in state["recent"].items()}

    def _is_learned(self) -> bool:
        if not self._recent or any(len(seen) < self.options.window for seen in self._recent.values()):
            return False
        values = list(self.accuracy.values())
        reached = min(values) if self.options.aggregate == "min" else sum(values) / len(values)
        return reached >= self.options.threshold

    def _advance(self, reason: str) -> bool:
        """Close the stage; the last stage goes on for ever and is recorded once."""
        last = self.stage == len(self.stages) - 1
        if last and (self.learned_all or reason != LEARNED):
            return False
        self.history.append(StageRecord(*self.stages[self.stage][:2], self.stage_tokens, self.accuracy, reason))
        self.learned_all = last
        if not last:
            self.stage += 1
            self.stage_tokens = 0
            self._forget()
        return not last

    def _forget(self) -> None:
        asked = self.stages[self.stage].tasks or self.tasks
        self._recent = {task: deque(maxlen=self.options.window) for task in asked}
