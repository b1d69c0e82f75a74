"""Batches of plain text: blocks of equal length, cut without gaps from one stream of tokens.

Every epoch cuts the stream at another phase and shuffles the blocks; within an epoch no token comes twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from mnemon.data.background import load_background
from mnemon.data.encoding import IGNORED
from mnemon.data.text import TokenStream, encode_background
from mnemon.errors import DataError
from mnemon.training.batches import Batch, dense_batch, share_rows
from mnemon.training.data_sections import TextData


@dataclass
class TextBatches:
    """Make the batch of an index: the next rows of the epoch's shuffled blocks.

    Attributes:
        data: background and length.
        tokenizer: a fast tokenizer with an end-of-text token.
        seed: of phase and order.
        batch_tokens: most tokens of a batch.
        min_rows: rows a batch has in any case.
        share: (rank, number of processes): which rows of a batch to keep, see `share_rows`.
        segment_length: tokens per segment of the model, None where it has no segments.
    """

    data: TextData
    tokenizer: PreTrainedTokenizerFast
    seed: int
    batch_tokens: int
    min_rows: int = 1
    share: tuple[int, int] = (0, 1)
    segment_length: int | None = None

    def make(self, index: int, stage: int) -> Batch:
        """Return this process's share of batch `index` (from 0); there is one stage."""
        stream, length = self._stream(), self.data.length
        rows = max(self.min_rows, self.batch_tokens // length)
        count = _blocks_per_epoch(len(stream), length)
        starts = []
        for number in range(index * rows, (index + 1) * rows):
            epoch, place = divmod(number, count)
            starts.append(_epoch_starts(self.seed, epoch, count, length)[place])
        ids = stream.ids[np.array(starts)[:, None] + np.arange(length)]
        input_ids = torch.from_numpy(ids.astype(np.int64))
        labels = input_ids.clone()
        labels[:, 0] = IGNORED
        batch = dense_batch(input_ids, labels, (), length)
        return share_rows(batch, *self.share, self.segment_length) | {"stage": stage}

    def check(self) -> None:
        """Refuse a text that is too short.

        Raises:
            DataError: the training text is shorter than two blocks.
        """
        tokens = len(self._stream())
        if _blocks_per_epoch(tokens, self.data.length) < 1:
            raise DataError(
                f"{self.data.background}: expected at least {2 * self.data.length} tokens of training text for "
                f"data.length {self.data.length}, got {tokens}; use more text or a smaller length"
            )

    def _stream(self) -> TokenStream:
        return encode_background(load_background(self.data.background, "train"), self.tokenizer)


def _blocks_per_epoch(tokens: int, length: int) -> int:
    """Return how many blocks fit whatever the phase."""
    return (tokens - length + 1) // length


@functools.lru_cache(maxsize=4)
def _epoch_starts(seed: int, epoch: int, count: int, length: int) -> NDArray[np.int64]:
    """Return where the blocks of an epoch begin, in the order in which they are read."""
    rng = np.random.default_rng([seed, epoch])
    return rng.integers(length) + length * rng.permutation(count)
