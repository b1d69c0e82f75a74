"""The cache a base decoder sees during one call: functional, so that gradients flow through it.

Hugging Face's own layers write some states in place and count blank columns as tokens. These layers take tensors from
a `MemoryState`, return new ones, and know how many of the call's tokens are real in every row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from mnemon.models.segments import SegmentCall


class _KeyValueLayer(DynamicLayer):
    """Keys and values of an attention block; growing by concatenation is already functional."""

    def __init__(self, entry: tuple[Tensor, ...]) -> None:
        super().__init__()
        if entry:
            self.lazy_initialization(*entry)
            self.keys, self.values = entry


class _ConvolutionLayer(LinearAttentionLayer):
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
        lengths = self.call.lengths
        if self.call.is_dense:
            kept = padded[..., -kernel:]
        else:
            index = torch.from_numpy(lengths[:, None] + np.arange(kernel)[None, :]).to(padded.device)
            kept = padded.gather(-1, index[:, None, :].expand(-1, padded.shape[1], -1))
        self.result = (kept,)
        return full


class BaseCache(Cache):
    """Cache for one call of the base decoder.

    Args:
        entries: what every block carries (`MemoryState.base`).
        layer_kinds: "attention" or "conv", one per block.
        call: the call about to be made.
    """

    def __init__(self, entries: Sequence[tuple[Tensor, ...]], layer_kinds: Sequence[str], call: SegmentCall) -> None:
        layers: list[Any] = [
            _ConvolutionLayer(entry, call) if kind == "conv" else _KeyValueLayer(entry)
            for entry, kind in zip(entries, layer_kinds, strict=True)
        ]
        super().__init__(layers=layers)
        self.attention_index = next((i for i, kind in enumerate(layer_kinds) if kind == "attention"), None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the cached key columns."""
        if self.attention_index is None:
            return 0
        layer: Any = self.layers[self.attention_index]
        return int(layer.get_seq_length())

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return None, which keeps the block off its in-place single-token path."""
        return None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return False, for the same reason (older releases ask this way)."""
        return False

    def entries(self, keep: slice | Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Return what every block carries on, with the key columns `keep` (a slice, or indices)."""
        return tuple(
            layer.result if isinstance(layer, _ConvolutionLayer) else _select_columns(layer, keep)
            for layer in self.layers
        )


def _select_columns(layer: Any, keep: slice | Tensor) -> tuple[Tensor, ...]:
    if not layer.is_initialized:
        return ()
    if isinstance(keep, slice):
        return layer.keys[:, :, keep], layer.values[:, :, keep]
    return layer.keys.index_select(2, keep), layer.values.index_select(2, keep)
