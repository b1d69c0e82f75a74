"""The cache a base decoder sees during one call: functional, so that gradients flow through it.

Hugging Face's own layers write some states in place and count blank columns as tokens. These layers take tensors from
a `MemoryState`, return new ones, and know how many of the call's tokens are real in every row.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from mnemon.layers.routing import RoutingStatistics
from mnemon.models.segments import SegmentCall

# Which cached key columns are carried on: runs of neighbouring columns, or indices where ragged rows leave holes.
Columns = list[slice] | Tensor


class PastView(Protocol):
    """How a call sees the first cached columns (the keys of attention sinks are moved on).

    Attributes:
        width: number of first columns concerned.
        second_copy: whether the moved columns come before the cached ones, or in place of the first.
    """

    width: int
    second_copy: bool

    def moved(self, head: Tensor) -> Tensor:
        """Return the keys [B, H, width, d] at their new positions."""


class KeyValueLayer(DynamicLayer):
    """Keys and values of one attention block during one call.

    Args:
        entry: cached (keys, values), in one or several pieces (keys, values, keys, values, ...), oldest first.
        view: how the call sees the first of them; None = as they are.
    """

    def __init__(self, entry: tuple[Tensor, ...], view: PastView | None = None) -> None:
        super().__init__()
        self.entry = entry
        self.view = view
        self.new: tuple[Tensor, ...] = ()
        self.seen: tuple[Tensor, ...] = ()
        self.on_joined: Any = None
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return the cached key columns."""
        return sum(keys.shape[-2] for keys in self.entry[0::2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what the call attends to: the cached keys and values followed by its own, copied only once."""
        self.new = (key_states, value_states)
        keys, values = [*self.entry[0::2]], [*self.entry[1::2]]
        if self.view is not None:
            moved = self.view.moved(_first_columns(keys, self.view.width))
            if self.view.second_copy:
                keys, values = [moved, *keys], [_first_columns(values, self.view.width), *values]
            else:
                keys = [moved, *_without_first_columns(keys, self.view.width)]
        self.seen = (_joined([*keys, key_states]), _joined([*values, value_states]))
        if self.on_joined is not None:
            self.on_joined(self, ([*keys, key_states], [*values, value_states]))
        return self.seen[0], self.seen[1]

    def selected(self, columns: Columns) -> tuple[Tensor, ...]:
        """Return the columns to carry on, as they were computed, in one piece for each run of columns."""
        if not self.seen:
            return self.entry
        if isinstance(columns, Tensor):
            whole = (_joined([*self.entry[part::2], self.new[part]]) for part in (0, 1))
            return tuple(tensor.index_select(-2, columns) for tensor in whole)
        # The last run is a view of what the call attended to: nothing is copied a second time.
        altered = 0 if self.view is None or self.view.second_copy else self.view.width
        extra = self.view.width if self.view is not None and self.view.second_copy else 0
        runs = [part for run in columns for part in _split_at(run, altered)]
        pieces: list[Tensor] = []
        for run in runs:
            for part in (0, 1):
                if run.stop <= altered:
                    piece = _first_columns([*self.entry[part::2]], altered)[..., run, :]
                else:
                    piece = self.seen[part][..., run.start + extra : run.stop + extra, :]
                # A small piece must not hold on to all the columns it was cut from.
                pieces.append(piece if run is runs[-1] else piece.clone())
        return tuple(pieces) if pieces else tuple(tensor[..., :0, :] for tensor in self.seen)

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


class MemoryEntry(LinearAttentionLayer):
    """State of one block with linear memories during one call.

    Attributes:
        past: the tensors that were carried; () before the first token.
        result: those to carry on.
        counts_routing: whether the block is to say how its router chose.
        routing: the sums of these choices, if it was asked and has a router.
    """

    is_compileable = False

    def __init__(self, past: tuple[Tensor, ...], counts_routing: bool = False) -> None:
        super().__init__()
        self.past = past
        self.result: tuple[Tensor, ...] = past
        self.counts_routing = counts_routing
        self.routing: RoutingStatistics | None = None


class BaseCache(Cache):
    """Cache for one call of the base decoder.

    Args:
        entries: what every block carries (`MemoryState.base`).
        layer_kinds: "attention", "conv" or "memory", one per block.
        call: the call about to be made.
        views: how the call sees each block's cached keys and values; None = as they are.
        counts_routing: whether blocks with routers are to say how they chose.
    """

    def __init__(
        self,
        entries: Sequence[tuple[Tensor, ...]],
        layer_kinds: Sequence[str],
        call: SegmentCall,
        views: Sequence[PastView | None] | None = None,
        counts_routing: bool = False,
    ) -> None:
        views = [None] * len(entries) if views is None else views
        self.call = call
        self.states: list[KeyValueLayer | ConvolutionLayer | MemoryEntry] = []
        for entry, kind, view in zip(entries, layer_kinds, views, strict=True):
            if kind == "memory":
                self.states.append(MemoryEntry(entry, counts_routing))
            else:
                self.states.append(ConvolutionLayer(entry, call) if kind == "conv" else KeyValueLayer(entry, view))
        self._masks: dict[torch.device, Tensor] = {}
        layers: list[Any] = list(self.states)
        super().__init__(layers=layers)
        self.attention_index = next((i for i, kind in enumerate(layer_kinds) if kind == "attention"), None)

    def routing(self) -> tuple[RoutingStatistics, ...]:
        """Return how the routers chose in this call, one entry per block with one."""
        return tuple(s.routing for s in self.states if isinstance(s, MemoryEntry) and s.routing is not None)

    def mask(self, device: torch.device) -> Tensor | None:
        """Return which tokens of the call count, [B, width], those that do first; None = all."""
        if self.call.is_dense:
            return None
        if device not in self._masks:
            lengths = torch.from_numpy(self.call.lengths).to(device)
            self._masks[device] = torch.arange(self.call.width, device=device) < lengths[:, None]
        return self._masks[device]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the cached key columns."""
        if self.attention_index is None:
            return 0
        layer = self.states[self.attention_index]
        return layer.get_seq_length() if isinstance(layer, KeyValueLayer) else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the key columns of a mask and the first one's number, also where no block has keys."""
        return (query_length, 0) if self.attention_index is None else super().get_mask_sizes(query_length, layer_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return None, which keeps the block off its in-place single-token path."""
        return None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return False, for the same reason (older releases ask this way)."""
        return False

    @contextlib.contextmanager
    def keeping_pieces(self, attentions: Sequence[nn.Module]) -> Iterator[None]:
        """Let the backward pass join keys and values again instead of keeping a joined copy for every call.

        A call joins all earlier keys with its own; keeping every one of these copies would cost memory quadratic in
        the length of the text. Only what is kept between the joining and the end of the attention is looked at.

        Args:
            attentions: the attention modules of the decoder.
        """
        running: list[Any] = []

        def leave(*_: Any) -> None:
            while running:
                running.pop().__exit__()

        def enter(layer: KeyValueLayer, pieces: tuple[list[Tensor], list[Tensor]]) -> None:
            if len(pieces[0]) == 1:
                return
            joined = {seen.data_ptr(): (seen.shape, parts) for seen, parts in zip(layer.seen, pieces, strict=True)}

            def pack(tensor: Tensor) -> Any:
                shape, parts = joined.get(tensor.data_ptr(), (None, []))
                return [part.detach() for part in parts] if shape == tensor.shape else tensor

            def unpack(packed: Any) -> Tensor:
                return packed if isinstance(packed, Tensor) else _joined(packed)

            running.append(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
            running[-1].__enter__()

        for state in self.states:
            if isinstance(state, KeyValueLayer):
                state.on_joined = enter
        handles = [module.register_forward_hook(leave) for module in attentions]
        try:
            yield
        finally:
            leave()
            for handle in handles:
                handle.remove()


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-2)


def _first_columns(pieces: list[Tensor], width: int) -> Tensor:
    """Return the first `width` columns of pieces laid end to end."""
    if pieces[0].shape[-2] >= width:
        return pieces[0][..., :width, :]
    return _joined(pieces)[..., :width, :]


def _without_first_columns(pieces: list[Tensor], width: int) -> list[Tensor]:
    left = []
    for piece in pieces:
        skipped = min(width, piece.shape[-2])
        width -= skipped
        if skipped < piece.shape[-2]:
            left.append(piece[..., skipped:, :])
    return left


def _split_at(run: slice, edge: int) -> list[slice]:
    return [slice(run.start, edge), slice(edge, run.stop)] if run.start < edge < run.stop else [run]
