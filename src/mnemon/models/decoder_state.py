"""What a Hugging Face decoder carries from call to call, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mnemon.layers.routing import RoutingStatistics


@dataclass(frozen=True)
class DecoderState:
    """What a decoder carries from call to call.

    Attributes:
        counts: real tokens read so far, one number per row; kept on the host so that decoding never waits for a device.
        base: one entry per block: (keys, values) of an attention block, possibly in several pieces; (convolution
            state,) of a convolution block; () before the first token.
        key_positions: position of every cached key column, [B, columns], -1 for a blank column; on the host, one
            array for each distinct `Reach` of the decoder's blocks.
        routing: how the routers of blocks with mixtures of memories chose since someone began to count, one entry per
            such block; None = nobody counts.
    """

    counts: tuple[int, ...]
    base: tuple[tuple[Tensor, ...], ...]
    key_positions: tuple[np.ndarray, ...] = field(repr=False)
    routing: tuple[RoutingStatistics, ...] | None = field(default=None, repr=False)

    def select(self, rows: Tensor, host_rows: Sequence[int]) -> Self:
        """Return the rows named by the indices `rows` (the same numbers in `host_rows`)."""
        chosen = self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        return replace(
            chosen,
            counts=tuple(self.counts[row] for row in host_rows),
            key_positions=tuple(positions[list(host_rows)] for positions in self.key_positions),
        )

    def without(self, rows: np.ndarray) -> Self:
        """Forget what the decoder keeps of the rows where `rows` [B] is True; their counts stay.

        Such rows then stand as before their first token: no key is visible, and a convolution sees zeros.
        """
        if not rows.any():
            return self
        if rows.all():
            empty = tuple(positions[:, :0] for positions in self.key_positions)
            return replace(self, base=((),) * len(self.base), key_positions=empty)
        forgotten = torch.from_numpy(rows)

        def cleared(entry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if len(entry) != 1:
                return entry  # keys and values; the next call leaves out columns that no row sees
            return (entry[0].masked_fill(forgotten.to(entry[0].device)[:, None, None], 0),)

        return replace(
            self,
            base=tuple(map(cleared, self.base)),
            key_positions=tuple(np.where(rows[:, None], -1, positions) for positions in self.key_positions),
        )

    def map(self, function: Any) -> Self:
        """Apply a function to every tensor."""
        return replace(self, base=tuple(tuple(map(function, entry)) for entry in self.base))
