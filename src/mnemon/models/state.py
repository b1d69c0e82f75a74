"""The memory as a value: everything a model carries from one call to the next.

`MemoryState` goes into a forward pass and a new one comes out; nothing in it is ever written in place, so sharing
tensors between states (`branch`) is safe. `MemoryCacheLayer` lets the state ride through Hugging Face's `generate()`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mnemon.errors import StateError
from mnemon.layers.associative_memory import Association
from mnemon.layers.memory_bank import SegmentRead, WriteStatistics
from mnemon.models.decoder_state import DecoderState


@dataclass(frozen=True)
class MemoryState:
    """State of a batch of sequences after some tokens.

    Attributes:
        decoder: what the decoder itself carries: keys and values, states of convolutions and of linear memories.
    """

    decoder: DecoderState

    @property
    def counts(self) -> tuple[int, ...]:
        """Real tokens read so far, one number per row."""
        return self.decoder.counts

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.counts)

    @property
    def device(self) -> torch.device:
        """Where the state is; the CPU before the first token."""
        return next((tensor.device for tensor in self.tensors()), torch.device("cpu"))

    def detach(self) -> Self:
        """Return the same state cut off from the gradients of what led to it."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> Self:
        """Return the state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def branch(self) -> Self:
        """Return an independent continuation point (tensors are shared and never written in place)."""
        return replace(self)

    def select(self, rows: Tensor) -> Self:
        """Return the rows named by the indices `rows`, in that order; a row may appear several times.

        Source: what Hugging Face's beam search asks of a cache (`reorder_cache`).
        """
        chosen = self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        return replace(chosen, decoder=self.decoder.select(rows, rows.tolist()))

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the state, without what follows from others."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._map(note)
        return found

    def num_bytes(self) -> int:
        """Return the bytes all tensors of the state take, without what follows from others."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def _map(self, function: Any) -> Self:
        return replace(self, decoder=self.decoder.map(function))


@dataclass(frozen=True)
class LM2State(MemoryState):
    """State of a batch of sequences that an LM2 model has read.

    Attributes:
        bank: memory slots, [B, 1, J, W] in flow `depth`, [B, blocks with memory, J, W] in flow `layer`.
        kept: running product of the forget gates, same shape as `bank`: how much of the initial bank is left.
        statistics: write statistics of the unfinished segment, one entry per block with memory.
        projections: the running segment's projections of the bank, one entry per block with memory; empty where they
            have to be computed (again). They follow from the bank, and spare decoding 6JW² operations per token.
    """

    bank: Tensor
    kept: Tensor
    statistics: tuple[WriteStatistics, ...]
    projections: tuple[SegmentRead, ...] = field(default=(), repr=False)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the state, without what follows from others."""
        return MemoryState.tensors(replace(self, projections=()))

    def _map(self, function: Any) -> Self:
        return replace(
            super()._map(function),
            bank=function(self.bank),
            kept=function(self.kept),
            statistics=tuple(WriteStatistics(*map(function, entry)) for entry in self.statistics),
            projections=tuple(SegmentRead(*map(function, entry)) for entry in self.projections),
        )


@dataclass(frozen=True)
class RMTState(MemoryState):
    """State of a batch of sequences that an RMT model has read.

    What the decoder carries is that of the running segment alone.

    Attributes:
        memory: the memory tokens that the running segment reads, [B, m, D].
    """

    memory: Tensor

    def _map(self, function: Any) -> Self:
        return replace(super()._map(function), memory=function(self.memory))


@dataclass(frozen=True)
class ARMTState(MemoryState):
    """State of a batch of sequences that an RMT model with associative memories has read.

    What the decoder carries is that of the running segment alone.

    Attributes:
        associations: what the memory of every block holds.
    """

    associations: tuple[Association, ...]

    def _map(self, function: Any) -> Self:
        held = tuple(Association(*map(function, entry)) for entry in self.associations)
        return replace(super()._map(function), associations=held)


class MemoryCacheLayer(CacheLayerMixin):
    """The one layer of a `MemoryCache`: holds a `MemoryState` and the number of columns `generate()` has fed."""

    _layer_type = "mnemon_memory"
    supports_early_init = False

    def __init__(self, state: MemoryState | None = None, **_: Any) -> None:
        super().__init__()
        self.state = state
        self.columns = 0

    @property
    def is_initialized(self) -> bool:
        """Whether any token has been read."""
        return self.state is not None

    @is_initialized.setter
    def is_initialized(self, _: bool) -> None:
        """Ignored: the base class sets it in its constructor; here it follows from the state."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the model builds the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: keys and values live in the state."""
        raise StateError("a memory cache takes no keys or values; pass it to the model as past_key_values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns after a call of `query_length`, and offset 0."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Return the columns fed in this `generate()` call (a memory handed in counts as none)."""
        return self.columns

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.state is not None:
            self._select(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a recurrent memory cannot be rolled back."""
        raise StateError("a memory cannot be rolled back; keep a MemoryState.branch() of the point to return to")

    def offload(self) -> None:
        """Move the state to the CPU."""
        if self.state is not None:
            self._device = self.state.device
            self.state = self.state.to("cpu")

    def prefetch(self) -> None:
        """Move an offloaded state back."""
        if self.state is not None and hasattr(self, "_device"):
            self.state = self.state.to(self._device)

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(rows)


class MemoryCache(Cache):
    """What our models take and return as `past_key_values`.

    Args:
        state: memory to continue from; None = a fresh one. It is never changed; the cache is given new states.
    """

    def __init__(self, state: MemoryState | None = None) -> None:
        super().__init__(layers=[MemoryCacheLayer(state)])

    @property
    def memory(self) -> MemoryCacheLayer:
        """The layer that holds the state."""
        layer = self.layers[0]
        assert isinstance(layer, MemoryCacheLayer)
        return layer

    @property
    def state(self) -> MemoryState | None:
        """The memory after the tokens read so far."""
        return self.memory.state
