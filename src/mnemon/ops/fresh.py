"""Memory for a result of a whole sequence, which is written once and block by block."""

import numpy as np
import torch
from torch import Tensor

_HUGE_PAGES_BYTES = 2**22  # from here on NumPy asks for huge pages


def fresh(like: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor without values.

    The first write to every page of new memory interrupts the program, and with pages of 4 KiB this takes a tenth of
    the time of a fast rule. Linux gives pages of 2 MiB to programs that ask for them: NumPy does, and PyTorch does only
    where the environment told it to before it was imported.

    Args:
        like: a tensor of the dtype, device and class to return.
        shape: sizes.

    Returns:
        A contiguous tensor of that shape.
    """
    size = shape.numel() * like.element_size()
    plain = type(like) is Tensor and like.device.type == "cpu" and not torch.compiler.is_compiling()
    if not plain or size < _HUGE_PAGES_BYTES:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(like.dtype).view(shape)
