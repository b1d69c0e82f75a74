"""Tokens on their way into a memory: cut into whole blocks that begin at fixed places of every row.

Where a block begins depends on how many tokens a row has seen and on nothing else, so the same tokens make the same
blocks however they arrive. Everything here runs on the host.
"""

from collections.abc import Iterator, Sequence

import numpy as np


class Backlog:
    """The tokens of every row that have not been read yet.

    Args:
        ids: new token ids, [B, T].
        mask: True where they are real, [B, T]; None = everywhere.
        counts: tokens of every row that have been read.
        pending: ids of every row that waited for these; () for none.
    """

    def __init__(
        self, ids: np.ndarray, mask: np.ndarray | None, counts: Sequence[int], pending: Sequence[Sequence[int]]
    ) -> None:
        new = list(ids.astype(np.int64)) if mask is None else [row[real] for row, real in zip(ids, mask, strict=True)]
        waiting = pending or [()] * len(new)
        self.rows = [
            np.concatenate([np.array(old, dtype=np.int64), row]) for old, row in zip(waiting, new, strict=True)
        ]
        self.positions = np.array(counts, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens left in every row, [B]."""
        return np.array([len(row) for row in self.rows], dtype=np.int64)

    def blocks(self, length: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Take off whole blocks as long as a row has one.

        Args:
            length: tokens of a block; a row's blocks end at multiples of it.

        Yields:
            Token ids [B, width] and which of them are real (None = all). A row without a whole block takes no part.
        """
        while True:
            needed = length - self.positions % length
            taken = np.where(self.lengths >= needed, needed, 0)
            if not taken.any():
                return
            yield as_batch([row[:count] for row, count in zip(self.rows, taken, strict=True)])
            self.rows = [row[count:] for row, count in zip(self.rows, taken, strict=True)]
            self.positions = self.positions + taken

    def left_over(self) -> tuple[tuple[int, ...], ...]:
        """Return the ids that are left of every row; () if none are."""
        return tuple(tuple(row.tolist()) for row in self.rows) if self.lengths.any() else ()


def as_batch(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Lay rows side by side, blanks behind the short ones; returns ids [B, T] and what is real (None = all)."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    mask = np.arange(ids.shape[1])[None, :] < lengths[:, None]
    return ids, None if mask.all() else mask
