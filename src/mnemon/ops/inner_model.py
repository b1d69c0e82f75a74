"""What rules share whose memory is a small model that gradient descent trains while it reads."""

import math

import torch
from torch import Tensor


def fixed_weights(heads: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return weights an inner model starts from when nobody learned better ones, [H, rows, columns].

    A fixed, deterministic set of values that look random (cosines of incommensurable frequencies), scaled to the
    variance 1/rows: a model of several layers does not learn from zeros.
    """
    head, row, column = (torch.arange(1, size + 1, dtype=dtype, device=device) for size in (heads, rows, columns))
    phase = row[:, None] * (column * math.sqrt(2) + head[:, None, None] * math.sqrt(3))
    return torch.cos(phase) * math.sqrt(2 / rows)
