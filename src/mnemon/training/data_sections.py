"""The data section of a recipe: which samples a model trains on, one class per kind.

Every kind answers the same questions to the rest of the training: `curriculum`, `stages`, `task_names` (what answers
are counted by), `context_weight` (weight of the loss on tokens that carry no label, None = not computed) and `workers`.
What the samples look like is decided by `mnemon.data`; how they become batches, by the module of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from mnemon.data.mqar import MqarSettings
from mnemon.training.section import Length, Positive, Section, Share, check_tasks


class CurriculumSection(Section):
    """When the context grows.

    Attributes:
        threshold: share of right answers at which a length counts as learned.
        window: most recent questions per task over which that share is taken.
        aggregate: `mean` over the tasks, or `min`: every task must reach the threshold.
        share_shorter: share of batches drawn from lengths already passed.
        start_stage: index of the stage to begin with (earlier ones stay mixed in); `fact_limits` come first.
        min_stage_tokens: a stage lasts at least this many tokens.
        max_stage_tokens: advance after this many tokens even below the threshold (recorded); None = never. A list is
            for the stages in order, its last value for all later ones: contexts of facts alone ask the most per token.
        stop_when_learned: end the run when the last length is learned.
    """

    threshold: Share = 0.9
    window: Positive = 300
    aggregate: Literal["mean", "min"] = "mean"
    share_shorter: Annotated[float, Field(ge=0, lt=1)] = 0.3
    start_stage: Annotated[int, Field(ge=0)] = 0
    min_stage_tokens: Annotated[int, Field(ge=0)] = 0
    max_stage_tokens: Positive | Annotated[list[Positive | None], Field(min_length=1)] | None = None
    stop_when_learned: bool = False

    @field_validator("max_stage_tokens", mode="wrap")
    @classmethod
    def _one_or_several(cls, most: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(most)
        except ValidationError:  # whose lines are one per kind of value, none of which says what is expected
            raise ValueError(f"expected a number of tokens above 0, null, or a list of these, got {most!r}") from None

    def most_tokens(self, stage: int) -> int | None:
        """Return the most tokens of stage number `stage`, None = any."""
        most = self.max_stage_tokens
        return most[min(stage, len(most) - 1)] if isinstance(most, list) else most


class Stage(NamedTuple):
    """One stage of the curriculum.

    Attributes:
        length: context length in tokens.
        max_facts: most facts in it (for MQAR: its pairs), None = any number.
        tasks: tasks that are asked, () = all.
    """

    length: int
    max_facts: int | None = None
    tasks: tuple[str, ...] = ()


class BabilongData(Section):
    """BABILong training samples, generated while the run goes.

    Attributes:
        tasks: task -> weight of its share of the samples (a list means equal weights).
        background: `stdlib`, a folder of text files, or `hf:NAME`.
        lengths: context lengths in tokens, growing; 0 = facts only. One stage of the curriculum each.
        fact_limits: stages before these, with the first length and at most so many facts, growing: a small model
            finds out which fact answers a question much sooner when there are two than when there are ten.
        first_tasks: tasks of the `fact_limits` stages; empty = all of them.
        length_jitter: share of its length by which a context may be shorter, drawn for every batch. Where all lengths
            are multiples of a model's segments, questions always stand at the same place of a segment, and a model that
            sees one segment at a time fails wherever they stand elsewhere.
        share_names: whether the training's stories of every task are told of the persons and places of all tasks. Some
            tasks have names of their own; a small model then has to learn each task's names by that task alone. Not in
            the `fact_limits` stages: fewer names are learned sooner.
        questions_per_story: most questions asked at the end of one context.
        ask_once: tasks that are asked a single question per context, because further ones would be answered by those
            before them: in qa5 all are about the same handing over, in qa4 about the same three places. They need not
            be among `tasks`.
        loss_on: `answers`; `all` adds the mean loss of every other token times `context_loss_weight`, `facts` that of
            the tokens of the facts, not of the text they are hidden in.
        workers: processes that make batches; 0 = one background thread, enough for models that run on a CPU. With
            processes, a script that calls `train` needs the usual `if __name__ == "__main__":` guard.
    """

    kind: Literal["babilong"] = "babilong"
    tasks: dict[str, Annotated[float, Field(gt=0)]]
    background: str = "stdlib"
    lengths: Annotated[list[Length], Field(min_length=1)]
    fact_limits: list[Positive] = Field(default_factory=list)
    first_tasks: list[str] = Field(default_factory=list)
    length_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    curriculum: CurriculumSection = CurriculumSection()
    share_names: bool = False
    questions_per_story: Positive = 4
    ask_once: list[str] = Field(default_factory=list)
    loss_on: Literal["answers", "all", "facts"] = "answers"
    context_loss_weight: Annotated[float, Field(ge=0)] = 0.1
    workers: Annotated[int, Field(ge=0)] = 0

    @field_validator("tasks", mode="before")
    @classmethod
    def _weigh(cls, tasks: Any) -> Any:
        return dict.fromkeys(tasks, 1.0) if isinstance(tasks, list) else tasks

    @field_validator("tasks", "ask_once")
    @classmethod
    def _known(cls, tasks: Any) -> Any:
        check_tasks(tasks)
        return tasks

    @property
    def stages(self) -> list[Stage]:
        """Return the stages of the curriculum in order."""
        few = [Stage(self.lengths[0], limit, tuple(self.first_tasks)) for limit in self.fact_limits]
        return few + [Stage(length) for length in self.lengths]

    @property
    def task_names(self) -> list[str]:
        """Return the tasks."""
        return list(self.tasks)

    def questions_of(self, task: str) -> int:
        """Return the most questions about one context of a task."""
        return 1 if task in self.ask_once else self.questions_per_story

    @property
    def context_weight(self) -> float | None:
        """Return the weight of the loss on tokens that are no answers, None where it is not wanted."""
        return None if self.loss_on == "answers" else self.context_loss_weight

    @model_validator(mode="after")
    def _growing(self) -> BabilongData:
        if any(later <= earlier for earlier, later in zip(self.lengths, self.lengths[1:], strict=False)):
            raise ValueError(f"lengths must grow from stage to stage, got {self.lengths}")
        if any(later <= earlier for earlier, later in zip(self.fact_limits, self.fact_limits[1:], strict=False)):
            raise ValueError(f"fact_limits must grow from stage to stage, got {self.fact_limits}")
        for task in self.first_tasks:
            if task not in self.tasks:
                raise ValueError(f"first_tasks names {task}, which is not among the tasks {', '.join(self.tasks)}")
        _check_start(self.curriculum, self.stages)
        return self


class MqarSlice(Section):
    """One part of the MQAR samples: their length in tokens, their pairs, and the weight of its share of the batches."""

    length: Length
    num_pairs: Positive
    weight: Annotated[float, Field(gt=0)] = 1.0

    @property
    def name(self) -> str:
        """Return what answers about these samples are counted under."""
        return f"{self.num_pairs} pairs"


class MqarData(Section):
    """Multi-query associative recall, generated while the run goes; token ids without any text or tokenizer.

    The loss is on the values asked for. Every batch comes from one slice.

    Attributes:
        slices: lengths and numbers of pairs.
        vocab_size: ids of the samples, and rows of the embedding; above every length.
        power_a, num_passes, random_non_queries: as in `mnemon.data.mqar.MqarSettings`.
        in_stages: whether the slices are stages of the curriculum, in their order; else all are mixed from the start.
        curriculum: when the next slice begins (with `in_stages`), and whether the run ends when all is learned.
        workers: processes that make batches; 0 = one background thread, which is far faster than any model.
    """

    kind: Literal["mqar"]
    slices: Annotated[list[MqarSlice], Field(min_length=1)]
    vocab_size: Positive = 8192
    power_a: Annotated[float, Field(gt=0)] = 0.01
    num_passes: Positive = 1
    random_non_queries: bool = True
    in_stages: bool = False
    curriculum: CurriculumSection = CurriculumSection()
    workers: Annotated[int, Field(ge=0)] = 0

    def settings(self, part: MqarSlice) -> MqarSettings:
        """Return what the samples of a slice are made with.

        Raises:
            ConfigError: the pairs do not fit into the length, or the vocabulary is too small.
        """
        return MqarSettings(
            vocab_size=self.vocab_size,
            length=part.length,
            num_pairs=part.num_pairs,
            power_a=self.power_a,
            num_passes=self.num_passes,
            random_non_queries=self.random_non_queries,
        )

    @property
    def stages(self) -> list[Stage]:
        """Return one stage per slice, or a single one of the longest length that mixes them all."""
        if self.in_stages:
            return [Stage(part.length, part.num_pairs, (part.name,)) for part in self.slices]
        return [Stage(max(part.length for part in self.slices))]

    @property
    def task_names(self) -> list[str]:
        """Return the names of the slices, each once."""
        return list(dict.fromkeys(part.name for part in self.slices))

    @property
    def context_weight(self) -> None:
        """Return None: tokens without a label are never learned."""
        return None

    @model_validator(mode="after")
    def _possible(self) -> MqarData:
        for part in self.slices:
            self.settings(part)
        _check_start(self.curriculum, self.stages)
        return self


class TextData(Section):
    """Plain text for next-token prediction, in blocks without gaps; the loss is on every token but a block's first.

    Attributes:
        background: `stdlib`, a folder of text files, or `hf:NAME`; held-out text comes from other documents of it.
        length: tokens of a block.
        workers: processes that make batches; 0 = one background thread, which is far faster than any model.
    """

    kind: Literal["text"]
    background: str = "stdlib"
    length: Annotated[Length, Field(ge=2)]
    workers: Annotated[int, Field(ge=0)] = 0

    @property
    def curriculum(self) -> CurriculumSection:
        """Return the defaults: there is one stage, and no question by which to advance."""
        return CurriculumSection()

    @property
    def stages(self) -> list[Stage]:
        """Return the one stage."""
        return [Stage(self.length)]

    @property
    def task_names(self) -> list[str]:
        """Return nothing: text asks no questions."""
        return []

    @property
    def context_weight(self) -> None:
        """Return None: every token that has a predecessor carries a label already."""
        return None


def kind_of(data: Any) -> str:
    """Return the kind that a data section, checked or as read from YAML, says it is; `babilong` unless it says so."""
    return str(data.get("kind", "babilong") if isinstance(data, dict) else getattr(data, "kind", "babilong"))


DataSection = Annotated[
    Annotated[BabilongData, Tag("babilong")] | Annotated[MqarData, Tag("mqar")] | Annotated[TextData, Tag("text")],
    Discriminator(kind_of),
]
DATA_KINDS: dict[str, type[Section]] = {"babilong": BabilongData, "mqar": MqarData, "text": TextData}


def _check_start(curriculum: CurriculumSection, stages: Sequence[Stage]) -> None:
    if curriculum.start_stage >= len(stages):
        raise ValueError(
            f"curriculum.start_stage must be below the number of stages ({len(stages)}), got {curriculum.start_stage}"
        )
