"""Batches of multi-query associative recall: every batch from one slice, so that no row needs padding.

MQAR labels stand at the index of the query itself, and the trainer compares output t with label t + 1; so the labels
are handed on one index later (`MqarSamples.next_token_labels`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from mnemon.data.mqar import generate
from mnemon.training.batches import Batch, dense_batch, share_rows
from mnemon.training.data_sections import MqarData, MqarSlice


@dataclass
class MqarBatches:
    """Make the batch of an index: fresh samples of a slice drawn by weight (mixed), or of the stage's (in stages).

    Attributes:
        data: slices, vocabulary and curriculum.
        seed: of every choice here.
        batch_tokens: most tokens of a batch.
        min_rows: rows a batch has in any case.
        share: (rank, number of processes): which rows of a batch to keep, see `share_rows`.
        segment_length: tokens per segment of the model, None where it has no segments.
    """

    data: MqarData
    seed: int
    batch_tokens: int
    min_rows: int = 1
    share: tuple[int, int] = (0, 1)
    segment_length: int | None = None

    def make(self, index: int, stage: int) -> Batch:
        """Return this process's share of batch `index` (from 0) of a run that has reached `stage`."""
        rng = random.Random(f"mqar {self.seed}/{index}/{stage}")
        drawn, part = self._draw(rng, stage)
        rows = max(self.min_rows, self.batch_tokens // part.length)
        samples = generate(self.data.settings(part), rows, seed=rng.getrandbits(128))
        input_ids, labels = torch.from_numpy(samples.input_ids), torch.from_numpy(samples.next_token_labels())
        batch = dense_batch(input_ids, labels, [part.name] * (rows * part.num_pairs), part.length)
        return share_rows(batch, *self.share, self.segment_length) | {"stage": drawn}

    def check(self) -> None:
        """Do nothing: the recipe refuses slices that are impossible."""

    def _draw(self, rng: random.Random, stage: int) -> tuple[int, MqarSlice]:
        """Return the stage that the batch counts for, and its slice."""
        slices = self.data.slices
        if not self.data.in_stages:
            return 0, rng.choices(slices, [part.weight for part in slices])[0]
        if stage > 0 and rng.random() < self.data.curriculum.share_shorter:
            stage = rng.choices(range(stage), [part.weight for part in slices[:stage]])[0]
        return stage, slices[stage]
