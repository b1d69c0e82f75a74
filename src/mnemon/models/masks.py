"""Attention masks from row positions.

The library counts columns; with ragged rows columns are not positions, so masks are built here, on the host, from the
position of every cached key. Where the result is the library's own causal mask, None is returned and the library
builds it (which keeps its fast paths).
"""

import numpy as np
import torch
from torch import Tensor

from mnemon.errors import BackendUnavailable
from mnemon.models.segments import SegmentCall


def call_key_positions(past: np.ndarray, call: SegmentCall) -> np.ndarray:
    """Positions of all key columns of a call, [B, cached + width]; -1 for blanks."""
    positions = call.positions()
    blank = np.arange(call.width)[None, :] >= call.lengths[:, None]
    return np.concatenate([past, np.where(blank, -1, positions)], axis=1)


def visibility(keys: np.ndarray, call: SegmentCall, window: int | None) -> np.ndarray | None:
    """Which keys every token of the call sees, [B or 1, width, columns]; None if it is the plain causal pattern."""
    queries = call.positions()
    cached = keys.shape[1] - call.width
    if (keys == keys[:1]).all() and (queries == queries[:1]).all() and call.is_dense:
        keys, queries = keys[:1], queries[:1]
    distance = queries[:, :, None] - keys[:, None, :]
    seen = (keys[:, None, :] >= 0) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    blank = ~(keys[:, None, cached:] >= 0) & np.eye(call.width, dtype=bool)[None]
    seen[:, :, cached:] |= blank  # a blank query sees itself: its output is never used, but a softmax needs one key
    causal = np.tri(call.width, keys.shape[1], cached, dtype=bool)
    return None if (seen == causal).all() else seen


def as_attention_mask(seen: np.ndarray, implementation: str | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Turn a visibility array into the 4-D mask an attention implementation takes.

    Raises:
        BackendUnavailable: for implementations that take no 4-D mask (flash attention, flex attention).
    """
    mask = torch.from_numpy(seen).to(device)[:, None]
    if implementation in (None, "sdpa"):
        return mask
    if implementation == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    raise BackendUnavailable(
        f"attn_implementation={implementation!r} takes no mask for ragged rows or an attention span; use sdpa or eager"
    )
