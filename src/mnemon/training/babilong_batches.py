"""Batches of BABILong samples: rows of one context length, tasks drawn by weight, padded on the left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from mnemon.data.babilong import Sample, generate
from mnemon.data.background import Background, load_background
from mnemon.data.encoding import IGNORED, fact_columns, training_example
from mnemon.errors import DataError
from mnemon.training.batches import Batch, share_rows
from mnemon.training.data_sections import BabilongData, Stage

_ATTEMPTS = 20


class Row(NamedTuple):
    """One sample in tokens.

    Attributes:
        task: its task.
        ids: token ids.
        labels: answer tokens, -100 elsewhere.
        facts: which tokens belong to facts; None = nobody asks.
    """

    task: str
    ids: list[int]
    labels: list[int]
    facts: list[bool] | None


@dataclass
class BabilongBatches:
    """Make the batch of an index: rows of one context length, tasks drawn by weight, left-padded.

    Attributes:
        data: tasks, lengths, background and questions.
        tokenizer: a fast tokenizer with a pad token.
        seed: of every choice here.
        batch_tokens: most tokens of a batch, padding included.
        min_rows: rows a batch has in any case.
        split: `train` or `test` stories and background.
        share: (rank, number of processes): which rows of a batch to keep, see `share_rows`.
        segment_length: tokens per segment of the model, None where it has no segments.
    """

    data: BabilongData
    tokenizer: PreTrainedTokenizerFast
    seed: int
    batch_tokens: int
    min_rows: int = 1
    split: Literal["train", "test"] = "train"
    share: tuple[int, int] = (0, 1)
    segment_length: int | None = None
    _background: Background | None = field(default=None, repr=False)

    def make(self, index: int, stage: int) -> Batch:
        """Return this process's share of batch `index` (from 0) of a run that has reached `stage`."""
        rng = random.Random(f"{self.seed}/{self.split}/{index}/{stage}")
        stages = self.data.stages
        shorter = stage > 0 and rng.random() < self.data.curriculum.share_shorter
        # The few-fact stages only lead up to the first length; once it is reached they teach nothing it does not.
        first = len(self.data.fact_limits) if stage > len(self.data.fact_limits) else 0
        number = rng.randrange(first, stage) if shorter else stage
        chosen = stages[number]
        if self.data.length_jitter:
            chosen = chosen._replace(length=rng.randint(self._shortest(chosen), chosen.length))
        batch = self.collate(self._rows(chosen, rng), stages[number].length)
        return share_rows(batch, *self.share, self.segment_length) | {"stage": number}

    def check(self) -> None:
        """Make one sample of every task and stage, so that an impossible pair is refused before the run begins.

        Raises:
            ConfigError: no story of a task fits into a length.
        """
        for stage in self.data.stages:
            for task in stage.tasks or self.data.tasks:
                self._next({}, task, stage._replace(length=self._shortest(stage)), random.Random(0))

    def _shortest(self, stage: Stage) -> int:
        """Return the least length of a stage's contexts; at least 1, because 0 has a meaning of its own."""
        return min(stage.length, max(1, stage.length - int(self.data.length_jitter * stage.length)))

    def _rows(self, stage: Stage, rng: random.Random) -> list[Row]:
        """Draw rows until one more would exceed the token budget."""
        tasks = list(stage.tasks or self.data.tasks)
        weights = [self.data.tasks[task] for task in tasks]
        sources: dict[str, Iterator[Sample]] = {}
        rows: list[Row] = []
        longest = 0
        while True:
            task = rng.choices(tasks, weights)[0]
            row = self._encode(self._next(sources, task, stage, rng))
            longest = max(longest, len(row.ids))
            if len(rows) >= self.min_rows and longest * (len(rows) + 1) > self.batch_tokens:
                return rows
            rows.append(row)

    def _next(self, sources: dict[str, Iterator[Sample]], task: str, stage: Stage, rng: random.Random) -> Sample:
        """Return the next sample of a task, from a new source where the present one cannot reach the exact length."""
        for _ in range(_ATTEMPTS):
            if task not in sources:
                sources[task] = self._samples(task, stage, rng.getrandbits(48))
            try:
                return next(sources[task])
            except DataError as error:  # about one draw of background in a thousand cannot be cut to a short length
                del sources[task]
                fault = error
        raise fault

    def _samples(self, task: str, stage: Stage, seed: int) -> Iterator[Sample]:
        if self._background is None:
            self._background = load_background(self.data.background, self.split)
        return generate(
            task,
            stage.length,
            max(self.batch_tokens, self.min_rows),  # made one by one; no batch has more rows than this
            self.tokenizer,
            background=self._background,
            split=self.split,
            seed=seed,
            num_questions=self.data.questions_of(task),
            max_facts=stage.max_facts,
            share_names=self.data.share_names and stage.max_facts is None,
        )

    def _encode(self, sample: Sample) -> Row:
        ids, labels = training_example(sample, self.tokenizer, max_questions=self.data.questions_per_story)
        facts = fact_columns(sample, self.tokenizer, ids) if self.data.loss_on == "facts" else None
        return Row(sample.task, ids, labels, facts)

    def collate(self, rows: list[Row], length: int) -> Batch:
        """Stack rows, padded on the left so that the questions of all rows stand at the end.

        Args:
            rows: what stands in them; labels mark answer tokens, -100 elsewhere.
            length: context length of the rows in tokens, for the statistics.

        Returns:
            The batch; all answer tokens of a question together are one question.
        """
        width = max(len(row.ids) for row in rows)
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        context = torch.zeros((len(rows), width), dtype=torch.bool)
        question_ids: list[int] = []
        tasks: list[str] = []
        for number, (task, ids, row_labels, facts) in enumerate(rows):
            start = width - len(ids)
            input_ids[number, start:] = torch.tensor(ids)
            labels[number, start:] = torch.tensor(row_labels)
            mask[number, start:] = 1
            context[number, start + 1 :] = True if facts is None else torch.tensor(facts[1:])
            previous = IGNORED
            for label in row_labels:
                if label != IGNORED:
                    if previous == IGNORED:
                        tasks.append(task)
                    question_ids.append(len(tasks) - 1)
                previous = label
        first = int((labels != IGNORED).any(dim=0).nonzero()[0])
        context &= labels == IGNORED
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "question_ids": torch.tensor(question_ids),
            "questions": list(range(len(tasks))),
            "tasks": tasks,
            "keep": width - first + 1,
            "context": context,
            "tokens": int(mask.sum()),
            "answer_tokens": len(question_ids),
            "context_tokens": int(context.sum()),
            "length": length,
        }
