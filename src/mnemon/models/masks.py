"""Attention masks from row positions, and which cached keys are still needed.

The library counts columns; with ragged rows columns are not positions, so masks are built here, on the host, from the
position of every cached key. Where the result is the library's own causal mask, None is returned and the library
builds it (which keeps its fast paths).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemon.errors import BackendUnavailable
from mnemon.models.base_cache import Columns
from mnemon.models.segments import SegmentCall


class Reach(NamedTuple):
    """Which earlier tokens a block's attention sees.

    Attributes:
        limit: tokens seen, itself included; None = all.
        sinks: first tokens that stay visible beyond the limit.
        native: whether the decoder itself has this limit (a sliding window), so that its own masks know it.
    """

    limit: int | None
    sinks: int = 0
    native: bool = False


def reach_of(window: int | None, span: int | None, sinks: int, native_window: bool = True) -> Reach:
    """Combine a block's own sliding window with the model's attention span; the narrower one holds.

    Sinks belong to the span: a block whose own window is narrower never saw its first tokens that long.
    """
    if span is None or (window is not None and window <= span):
        return Reach(window, 0, window is not None and native_window)
    return Reach(span, sinks)


def call_key_positions(past: np.ndarray, call: SegmentCall) -> np.ndarray:
    """Positions of all key columns of a call, [B, cached + width]; -1 for blanks."""
    blank = np.arange(call.width)[None, :] >= call.lengths[:, None]
    return np.concatenate([past, np.where(blank, -1, call.positions)], axis=1)


class FarSinks(NamedTuple):
    """Sinks seen from beyond the span, moved to just before it.

    With a limit of s tokens and n sinks, tokens up to position s + n - 1 see the sinks at their own distance. For later
    tokens the sinks stand where they are just before the window of the segment's last token, so no distance exceeds
    s + n - 1. The move is the same for all tokens of a segment, hence for any cut of a text into calls.

    Attributes:
        is_sink: which of the first cached columns hold a sink, [B, columns].
        shift: positions the sinks are moved on, [B].
        second_copy: whether some tokens of the call still see the sinks at their own distance, so that the moved ones
            are a second copy before the cached columns; otherwise they replace the first.
    """

    is_sink: np.ndarray
    shift: np.ndarray
    second_copy: bool


def far_sinks(past: np.ndarray, call: SegmentCall, reach: Reach, segment_length: int) -> FarSinks | None:
    """Return the moved sinks of a call, None if all its tokens see the sinks at their own distance.

    Args:
        past: positions of the cached key columns, [B, columns].
        call: the call.
        reach: what its tokens see.
        segment_length: tokens C per segment.
    """
    if not reach.sinks or reach.limit is None:
        return None
    nearest = reach.limit + reach.sinks - 1
    last = (call.starts // segment_length + 1) * segment_length - 1
    shift = np.maximum(last - nearest, 0)
    if not shift.any():
        return None
    is_sink = (past >= 0) & (past < reach.sinks)
    is_sink = is_sink[:, : int(np.flatnonzero(is_sink.any(axis=0)).max(initial=-1)) + 1]
    return FarSinks(is_sink, shift, bool(((call.starts <= nearest) & (call.lengths > 0)).any()))


def visibility(keys: np.ndarray, call: SegmentCall, reach: Reach, sinks: FarSinks | None = None) -> np.ndarray | None:
    """Which keys every token of the call sees, [B or 1, width, columns]; None if it is the plain causal pattern.

    Args:
        keys: positions of the cached columns and the call's own, [B, cached + width].
        call: the call.
        reach: what its tokens see.
        sinks: moved sinks, whose second copy, if they are one, comes before all other columns.
    """
    if sinks is None and _is_plain_causal(keys, call, reach):
        return None
    queries = call.positions
    cached = keys.shape[1] - call.width
    if call.is_dense and (keys == keys[:1]).all() and (queries == queries[:1]).all():
        keys, queries = keys[:1], queries[:1]
    distance = queries[:, :, None] - keys[:, None, :]
    is_sink = (keys >= 0) & (keys < reach.sinks)
    seen = (keys[:, None, :] >= 0) & (distance >= 0)
    if reach.limit is not None:
        seen &= (distance < reach.limit) | is_sink[:, None, :]
    copies = 0
    if sinks is not None and sinks.second_copy:
        assert reach.limit is not None
        copies = sinks.is_sink.shape[1]
        is_far = queries[:, :, None] > reach.limit + reach.sinks - 1
        seen = np.concatenate([is_sink[:, None, :copies] & is_far, seen & ~(is_sink[:, None, :] & is_far)], axis=2)
    if not call.is_dense:
        # A blank query sees itself alone: its output is never used, but a softmax needs one key.
        blank = np.arange(call.width)[None, :] >= call.lengths[:, None]
        seen &= ~blank[:, :, None]
        seen[:, :, copies + cached :] |= blank[:, :, None] & np.eye(call.width, dtype=bool)[None]
    causal = np.tri(call.width, seen.shape[2], copies + cached, dtype=bool)
    return None if (seen == causal).all() else seen


def _is_plain_causal(keys: np.ndarray, call: SegmentCall, reach: Reach) -> bool:
    """Whether all keys are neighbours within reach, known without looking at every pair of query and key."""
    columns = keys.shape[1]
    if not call.is_dense or (reach.limit is not None and columns > reach.limit):
        return False
    return bool((keys[:, 0] >= 0).all() and (np.diff(keys, axis=1) == 1).all())


def takes_numbers_once(implementation: str | None, device: torch.device) -> bool:
    """Whether a mask should be numbers from the start.

    Fused attention turns a boolean mask into numbers in every block, and keeps them for the backward pass; autocast
    would have to convert numbers of another precision.
    """
    fused = implementation in (None, "sdpa")
    return fused and torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type)


def as_attention_mask(
    seen: np.ndarray | None,
    shape: tuple[int, int],
    implementation: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Turn a visibility array into the 4-D mask an attention implementation takes.

    Args:
        seen: result of `visibility`; None = causal.
        shape: queries and key columns of the call.
        implementation: Hugging Face's name of the attention implementation.
    Returns:
        A mask, or None where a single query sees every key.
    Raises:
        BackendUnavailable: for implementations that take no 4-D mask (flash attention, flex attention).
    """
    if seen is None:
        if shape[0] == 1:
            return None
        seen = np.tri(*shape, shape[1] - shape[0], dtype=bool)[None]
    mask = torch.from_numpy(seen).to(device)[:, None]
    if implementation in (None, "sdpa") and not takes_numbers_once(implementation, device):
        return mask
    if implementation in (None, "sdpa", "eager"):
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    raise BackendUnavailable(
        f"attn_implementation={implementation!r} takes no mask for ragged rows or an attention span; use sdpa or eager"
    )


def columns_to_keep(keys: np.ndarray, counts: np.ndarray, reach: Reach) -> np.ndarray:
    """Return the indices of the key columns that some later token still sees.

    Args:
        keys: position of every column, [B, columns], -1 for blanks.
        counts: real tokens read by now, [B].
        reach: what later tokens see.
    """
    needed = keys >= 0
    if reach.limit is not None:
        needed &= (keys > (counts - reach.limit)[:, None]) | (keys < reach.sinks)
    return np.flatnonzero(needed.any(axis=0))


def as_columns(indices: np.ndarray, device: torch.device) -> Columns:
    """Turn column indices into few slices where possible, which need no transfer to the device."""
    if len(indices) == 0:
        return []
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    runs = np.split(indices, breaks)
    if len(runs) > 2:
        return torch.from_numpy(indices).to(device)
    return [slice(int(run[0]), int(run[-1]) + 1) for run in runs]
