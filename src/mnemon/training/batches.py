"""Training batches that depend on nothing but (seed, index, stage).

A `BatchMaker` is the pure function, one class per kind of data (`mnemon.training.batch_makers` chooses); `BatchStream`
calls it ahead of time, in a thread or in processes, and hands the batches out in order. Because no batch depends on an
earlier one, a run resumes at any index without replaying, and several processes can make the same batch and keep a
share of its rows each (`share_rows`). What a sample looks like is decided by `mnemon.data`; what is done with a batch,
by the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, Protocol

import torch

from mnemon.data.encoding import IGNORED
from mnemon.training.curriculum import Curriculum

Batch = dict[str, Any]
"""What a step trains on.

`input_ids`, `attention_mask`, `labels` [B, T]: label t + 1 is compared with output t; -100 is ignored. `question_ids`
[labels that are not ignored] numbers the question of every label in row-major order (empty where nothing is asked);
`questions`: the number of each of these questions in the whole batch; `tasks`: the task of each question of the whole
batch; `keep`: the shortest suffix of columns whose outputs predict all labels; `context` [B, T]: tokens without a label
that the loss on the text is about; `tokens`, `answer_tokens`, `context_tokens`: real tokens, labels and tokens of
`context` in the whole batch; `length`: context length for the statistics; `stage`: the stage it was drawn from.
"""


class BatchMaker(Protocol):
    """Makes the batch of an index; the same arguments give the same batch, in any process and in any order."""

    def make(self, index: int, stage: int) -> Batch:
        """Return this process's share of batch `index` (from 0) of a run that has reached `stage`."""
        ...

    def check(self) -> None:
        """Refuse data from which no batch can be made, before the run begins.

        Raises:
            MnemonError: saying what is wrong with the data.
        """
        ...


def dense_batch(input_ids: torch.Tensor, labels: torch.Tensor, tasks: Sequence[str], length: int) -> Batch:
    """Return the batch of rows without padding.

    Args:
        input_ids: token ids, [B, T].
        labels: [B, T], at least one per row; label t + 1 is compared with output t, so the first column is ignored.
        tasks: task of every label in row-major order, each a question of its own; empty where nothing is asked.
        length: context length for the statistics, in tokens.
    """
    rows, width = input_ids.shape
    asked = labels != IGNORED
    first = int(asked.any(dim=0).nonzero()[0])
    answer_tokens = int(asked.sum())
    context = ~asked
    context[:, 0] = False
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "question_ids": torch.arange(len(tasks)),
        "questions": list(range(len(tasks))),
        "tasks": list(tasks),
        "keep": width - first + 1,
        "context": context,
        "tokens": rows * width,
        "answer_tokens": answer_tokens,
        "context_tokens": int(context.sum()),
        "length": length,
    }


def share_rows(batch: Batch, rank: int, count: int, segment_length: int | None = None) -> Batch:
    """Return the rows of one process, as many on every process and with as many segments.

    Rows are dealt out from the longest to the shortest. Where they run out, or where the rows of a process have fewer
    segments than the longest row of all, the process also gets a copy of that row that no loss is about: processes
    that share a network in pieces must call each piece equally often.

    Args:
        batch: a whole batch.
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
    share = {key: batch[key][rows] for key in ("input_ids", "attention_mask", "labels", "context")}
    share["labels"][len(own) :] = IGNORED
    share["context"][len(own) :] = False
    if not batch["questions"]:
        return batch | share
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
