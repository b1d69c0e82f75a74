"""The cache a base decoder sees during one call: functional, so that gradients flow through it.

Hugging Face's own layers write some states in place and count blank columns as tokens. These layers take tensors from
a `MemoryState`, return new ones, and know how many of the call's tokens are real in every row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from mnemon.models.segments import SegmentCall

# Which cached key columns are carried on: runs of neighbouring columns, or indices where ragged rows leave holes.
Columns = list[slice] | Tensor
# Gives the past keys and values a call sees from the cached ones (the keys of attention sinks are moved on).
PastView = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class KeyValueLayer(DynamicLayer):
    """Keys and values of one attention block during one call.

    Args:
        entry: cached (keys, values), in one or several pieces (keys, values, keys, values, ...), oldest first.
        view: how the call sees the cached keys and values; None = as they are.
    """

    def __init__(self, entry: tuple[Tensor, ...], view: PastView | None = None) -> None:
        super().__init__()
        self.entry = entry
        self.view = view
        self.new: tuple[Tensor, ...] = ()
        self.cached: tuple[Tensor, ...] = (_joined(entry[0::2]), _joined(entry[1::2])) if entry else ()
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return the cached key columns."""
        return self.cached[0].shape[-2] if self.cached else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what the call attends to: the cached keys and values followed by its own."""
        self.new = (key_states, value_states)
        if not self.cached:
            self.cached = self.new
            return key_states, value_states
        past_keys, past_values = self.cached
        self.cached = (_appended(past_keys, key_states), _appended(past_values, value_states))
        if self.view is None:
            return self.cached[0], self.cached[1]
        seen_keys, seen_values = self.view(past_keys, past_values)
        return _appended(seen_keys, key_states), _appended(seen_values, value_states)

    def selected(self, columns: Columns) -> tuple[Tensor, ...]:
        """Return (keys, values) of the columns to carry on, as they were computed."""
        return tuple(_select(tensor, columns) for tensor in self.cached)

    def pieces(self, kept: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the cached pieces `kept`, and this call's keys and values as a new one.

        Holding pieces instead of their concatenation keeps what a checkpointed segment saves linear in the length.
        """
        old = [tensor for index in kept for tensor in self.entry[2 * index : 2 * index + 2]]
        return (*old, *self.new)


class ConvolutionLayer(LinearAttentionLayer):
    """Last inputs of a short convolution, taken at each row's last real token."""

    is_compileable = False

    def __init__(self, entry: tuple[Tensor, ...], call: SegmentCall) -> None:
        super().__init__()
        self.past = entry[0] if entry else None
        self.call = call
        self.result: tuple[Tensor, ...] = entry

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Return the inputs preceded by the carried ones, and keep each row's last `conv_kernel_size` real inputs."""
        kernel = conv_kernel_size or conv_states.shape[-1]
        full = conv_states if self.past is None else torch.cat([self.past, conv_states], dim=-1)
        padded = torch.nn.functional.pad(conv_states, (kernel, 0)) if self.past is None else full
        if self.call.is_dense:
            kept = padded[..., -kernel:]
        else:
            index = torch.arange(kernel)[None, :] + torch.from_numpy(self.call.lengths)[:, None]
            index = index.to(padded.device)
            kept = padded.gather(-1, index[:, None, :].expand(-1, padded.shape[1], -1))
        self.result = (kept,)
        return full


class BaseCache(Cache):
    """Cache for one call of the base decoder.

    Args:
        entries: what every block carries (`MemoryState.base`).
        layer_kinds: "attention" or "conv", one per block.
        call: the call about to be made.
        views: how the call sees each block's cached keys and values; None = as they are.
    """

    def __init__(
        self,
        entries: Sequence[tuple[Tensor, ...]],
        layer_kinds: Sequence[str],
        call: SegmentCall,
        views: Sequence[PastView | None] | None = None,
    ) -> None:
        views = [None] * len(entries) if views is None else views
        self.states: list[KeyValueLayer | ConvolutionLayer] = [
            ConvolutionLayer(entry, call) if kind == "conv" else KeyValueLayer(entry, view)
            for entry, kind, view in zip(entries, layer_kinds, views, strict=True)
        ]
        layers: list[Any] = list(self.states)
        super().__init__(layers=layers)
        self.attention_index = next((i for i, kind in enumerate(layer_kinds) if kind == "attention"), None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the cached key columns."""
        if self.attention_index is None:
            return 0
        layer = self.states[self.attention_index]
        return layer.get_seq_length() if isinstance(layer, KeyValueLayer) else 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return None, which keeps the block off its in-place single-token path."""
        return None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return False, for the same reason (older releases ask this way)."""
        return False


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-2)


def _appended(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past, new], dim=-2)


def _select(tensor: Tensor, columns: Columns) -> Tensor:
    if isinstance(columns, Tensor):
        return tensor.index_select(-2, columns)
    runs = tuple(tensor[..., run, :] for run in columns)
    return _joined(runs) if runs else tensor[..., :0, :]
