"""The memory as a value: everything a model carries from one call to the next.

`MemoryState` goes into a forward pass and a new one comes out; nothing in it is ever written in place, so sharing
tensors between states (`branch`) is safe. `MemoryCacheLayer` lets the state ride through Hugging Face's `generate()`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mnemon.errors import StateError
from mnemon.layers.associative_memory import Association
from mnemon.layers.memory_bank import SegmentRead, WriteStatistics
from mnemon.models.decoder_state import DecoderState
from mnemon.models.provenance import Origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTES_PER_ID = 8


@dataclass(frozen=True)
class MemoryState:
    """State of a batch of sequences after some tokens.

    Attributes:
        decoder: what the decoder itself carries: keys and values, states of convolutions and of linear memories.
        pending: token ids of every row that wait until a whole block of them can be read (`memorize`); () for none.
        origin: the model that made the state.
    """

    decoder: DecoderState
    pending: tuple[tuple[int, ...], ...] = field(default=(), kw_only=True, repr=False)
    origin: Origin | None = field(default=None, kw_only=True, repr=False)

    @property
    def counts(self) -> tuple[int, ...]:
        """Real tokens the decoder has read so far, one number per row."""
        return self.decoder.counts

    @property
    def tokens_read(self) -> tuple[int, ...]:
        """Real tokens of every row, those included that wait for a whole block."""
        waiting = map(len, self.pending or ((),) * self.batch_size)
        return tuple(count + more for count, more in zip(self.counts, waiting, strict=True))

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
        host_rows = rows.tolist()
        pending = tuple(self.pending[row] for row in host_rows) if self.pending else ()
        return replace(chosen, decoder=self.decoder.select(rows, host_rows), pending=pending)

    @staticmethod
    def stack(states: "Sequence[MemoryState]") -> "MemoryState":
        """Put memories of the same model side by side, as the rows of one batch.

        Raises:
            StateError: if they are of different models or devices, or cannot be told apart from a fresh memory.
        """
        from mnemon.models.stacking import stack

        return stack(states)

    def save(
        self, path: str | Path, tokenizer: "PreTrainedTokenizerBase | None" = None, overwrite: bool = False
    ) -> Path:
        """Write the memory as one file (`mnemon.models.memory_file`); it appears complete or not at all.

        Args:
            path: the file, by custom `NAME.memory.safetensors`.
            tokenizer: what the text was cut into tokens with; its fingerprint goes into the file.
            overwrite: replace a file that is there.

        Raises:
            StateError: if the model has changed since, or another tokenizer was used before.
            ConfigError: if a file is there, and `overwrite` is not given.
            RunError: if the disk is full or the place is not writable.
        """
        from mnemon.models.memory_file import save_memory

        return save_memory(self, path, tokenizer, overwrite)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> "MemoryState":
        """Read a memory from a file; the model it is of is needed only to use it.

        Raises:
            DataError: if there is no such file, or it is of another kind, cut short, altered or of a newer version.
        """
        from mnemon.models.memory_file import load_memory

        return load_memory(path, device)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the state, without what follows from others."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.without_derived()._map(note)
        return found

    def contiguous(self) -> Self:
        """Return the state with every tensor in a piece of memory of its own, as if it came from a file."""
        return self.without_derived()._map(Tensor.contiguous)

    def num_bytes(self) -> int:
        """Return the bytes all tensors and waiting ids of the state take, without what follows from others."""
        waiting = _BYTES_PER_ID * sum(map(len, self.pending))
        return waiting + sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def without_derived(self) -> Self:
        """Return the state without what follows from its other parts."""
        return self

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
        write_rates: since someone began to count, every row's sum of the slots' mean rate over its updates, and their
            number, [B] each; None = nobody counts.
    """

    bank: Tensor
    kept: Tensor
    statistics: tuple[WriteStatistics, ...]
    projections: tuple[SegmentRead, ...] = field(default=(), repr=False)
    write_rates: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def without_derived(self) -> Self:
        """Return the state without the projections."""
        return replace(self, projections=())

    def _map(self, function: Any) -> Self:
        return replace(
            super()._map(function),
            bank=function(self.bank),
            kept=function(self.kept),
            statistics=tuple(entry.map(function) for entry in self.statistics),
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
