"""Training batches that depend on nothing but (seed, index, stage).

`BatchMaker` is the pure function; `BatchStream` calls it ahead of time, in a thread or in processes, and hands the
batches out in order. Because no batch depends on an earlier one, a run resumes at any index without replaying, and
several processes can make the same batch and keep a share of its rows each (`share_rows`). What a sample looks like is
decided by `mnemon.data`; what is done with a batch, by the trainer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from mnemon.data.babilong import Sample, generate
from mnemon.data.background import Background, load_background
from mnemon.data.encoding import IGNORED, training_example
from mnemon.errors import DataError
from mnemon.training.curriculum import Curriculum
from mnemon.training.recipe import DataSection, Stage

Batch = dict[str, Any]

_ATTEMPTS = 20


@dataclass
class BatchMaker:
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

    data: DataSection
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
        batch = self.collate(self._rows(stages[number], rng), stages[number].length)
        return share_rows(batch, *self.share, self.segment_length) | {"stage": number}

    def check(self) -> None:
        """Make one sample of every task and stage, so that an impossible pair is refused before the run begins.

        Raises:
            ConfigError: no story of a task fits into a length.
        """
        for stage in self.data.stages:
            for task in stage.tasks or self.data.tasks:
                self._next({}, task, stage, random.Random(0))

    def _rows(self, stage: Stage, rng: random.Random) -> list[tuple[str, list[int], list[int]]]:
        """Draw (task, ids, labels) until one more row would exceed the token budget."""
        tasks = list(stage.tasks or self.data.tasks)
        weights = [self.data.tasks[task] for task in tasks]
        sources: dict[str, Iterator[Sample]] = {}
        rows: list[tuple[str, list[int], list[int]]] = []
        longest = 0
        while True:
            task = rng.choices(tasks, weights)[0]
            ids, labels = self._encode(self._next(sources, task, stage, rng))
            longest = max(longest, len(ids))
            if len(rows) >= self.min_rows and longest * (len(rows) + 1) > self.batch_tokens:
                return rows
            rows.append((task, ids, labels))

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
            num_questions=self.data.questions_per_story,
            max_facts=stage.max_facts,
        )

    def _encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        return training_example(sample, self.tokenizer, max_questions=self.data.questions_per_story)

    def collate(self, rows: list[tuple[str, list[int], list[int]]], length: int) -> Batch:
        """Stack rows, padded on the left so that the questions of all rows stand at the end.

        Args:
            rows: (task, token ids, labels) per row; labels mark answer tokens, -100 elsewhere.
            length: context length of the rows in tokens, for the statistics.

        Returns:
            `input_ids`, `attention_mask`, `labels` [B, T]; `question_ids` [answer tokens] numbers the question of every
            answer token in row-major order; `questions`: the number of each of these questions in the whole batch;
            `tasks`: the task of each question of the whole batch; `keep`: the shortest suffix of columns whose logits
            predict all answers; `counted` [B]: rows that take part in the loss; `tokens`, `answer_tokens`,
            `context_tokens`: real tokens, answers, and the others that have a predecessor, in the whole batch;
            `length`.
        """
        width = max(len(ids) for _, ids, _ in rows)
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        question_ids: list[int] = []
        tasks: list[str] = []
        for row, (task, ids, row_labels) in enumerate(rows):
            start = width - len(ids)
            input_ids[row, start:] = torch.tensor(ids)
            labels[row, start:] = torch.tensor(row_labels)
            mask[row, start:] = 1
            previous = IGNORED
            for label in row_labels:
                if label != IGNORED:
                    if previous == IGNORED:
                        tasks.append(task)
                    question_ids.append(len(tasks) - 1)
                previous = label
        first = int((labels != IGNORED).any(dim=0).nonzero()[0])
        followers = int((mask[:, 1:] & mask[:, :-1]).sum())
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "question_ids": torch.tensor(question_ids),
            "questions": list(range(len(tasks))),
            "tasks": tasks,
            "keep": width - first + 1,
            "counted": torch.ones(len(rows), dtype=torch.bool),
            "tokens": int(mask.sum()),
            "answer_tokens": len(question_ids),
            "context_tokens": followers - len(question_ids),
            "length": length,
        }


def share_rows(batch: Batch, rank: int, count: int, segment_length: int | None = None) -> Batch:
    """Return the rows of one process, as many on every process and with as many segments.

    Rows are dealt out from the longest to the shortest. Where they run out, or where the rows of a process have fewer
    segments than the longest row of all, the process also gets a copy of that row with every label ignored: processes
    that share a network in pieces must call each piece equally often.

    Args:
        batch: a whole batch, as `BatchMaker.collate` returns it.
        rank: number of the process, from 0.
        count: number of processes.
        segment_length: tokens per segment of the model, None where it has no segments.

    Returns:
        The batch with this process's rows of the row-wise entries; the numbers about the whole batch stay.
    """
    if count == 1:
        return batch
    lengths = batch["attention_mask"].sum(dim=1)
    order = lengths.argsort(descending=True, stable=True).tolist()
    own, longest = order[rank::count], order[0]
    fillers = -(-len(order) // count) - len(own)
    if not fillers and segment_length is not None:
        fillers = int(-(-lengths[own[0]] // segment_length) < -(-lengths[longest] // segment_length))
    rows = own + [longest] * fillers
    share = {key: batch[key][rows] for key in ("input_ids", "attention_mask", "labels", "counted")}
    share["labels"][len(own) :] = IGNORED
    share["counted"][len(own) :] = False
    row_of_token = (batch["labels"] != IGNORED).nonzero()[:, 0]
    question_ids = torch.cat([batch["question_ids"][row_of_token == row] for row in own] or [row_of_token[:0]])
    questions = list(dict.fromkeys(question_ids.tolist()))
    numbers = {question: number for number, question in enumerate(questions)}
    share["question_ids"] = torch.tensor([numbers[question] for question in question_ids.tolist()], dtype=torch.long)
    return batch | share | {"questions": questions}


class BatchStream:
    """Endless batches from `start` on, made ahead; a change of stage takes effect at the very next batch."""

    def __init__(self, maker: BatchMaker, curriculum: Curriculum, start: int = 0, workers: int = 0) -> None:
        self.maker = maker
        self.curriculum = curriculum
        self.index = start
        self.ahead = 2 if workers == 0 else 2 * workers
        self._executor = _executor(maker, workers)
        self._pending: dict[tuple[int, int], Future[Batch]] = {}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            key = (self.index, self.curriculum.stage)
            self._request(*key)
            batch = self._pending.pop(key).result()
            self.index += 1
            yield batch

    def close(self) -> None:
        """Stop making batches."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _request(self, index: int, stage: int) -> None:
        """Have this batch and the next ones made; drop those that were made for another stage."""
        wanted = [(index + offset, stage) for offset in range(self.ahead + 1)]
        for key in [key for key in self._pending if key not in wanted]:
            self._pending.pop(key).cancel()
        for key in wanted:
            if key not in self._pending:
                self._pending[key] = self._executor.submit(_make, self.maker if self._in_thread else None, *key)

    @property
    def _in_thread(self) -> bool:
        return isinstance(self._executor, ThreadPoolExecutor)


_worker_maker: BatchMaker | None = None


def _executor(maker: BatchMaker, workers: int) -> Executor:
    if workers == 0:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    context = get_context("spawn")  # forking a process with torch's threads may hang
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_set_worker_maker, initargs=(maker,))


def _set_worker_maker(maker: BatchMaker) -> None:
    """Give a worker process its maker once, instead of with every batch."""
    global _worker_maker
    _worker_maker = maker
    torch.set_num_threads(1)


def _make(maker: BatchMaker | None, index: int, stage: int) -> Batch:
    maker = maker or _worker_maker
    assert maker is not None
    return maker.make(index, stage)
