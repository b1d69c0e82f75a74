"""A memory layer in the place of a decoder block's attention."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mnemon.errors import StateError
from mnemon.layers.linear_memory import LinearMemory, LinearMemoryState
from mnemon.layers.mixture_of_memories import MixtureOfMemories, MixtureState
from mnemon.models.base_cache import BaseCache, MemoryEntry


class MemoryMixer(nn.Module):
    """What a block calls instead of its attention: takes what an attention takes, ignores positions and masks.

    The state comes from and goes to the cache of the call; without one, the tokens are read as a text of their own.

    Args:
        layer: the memory layer.
        index: number of the block.
        num_values: how many values the block takes from its attention.
    """

    def __init__(self, layer: LinearMemory | MixtureOfMemories, index: int, num_values: int = 2) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        self.num_values = num_values

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, layer_past: Any = None, **kwargs: Any
    ) -> tuple[Tensor | None, ...]:
        """Return what the memories answer [B, T, D], and None for attention weights and whatever else."""
        cache = past_key_values if past_key_values is not None else layer_past
        output = self.layer(hidden_states)[0] if cache is None else self._answer(hidden_states, cache)
        return output, *[None] * (self.num_values - 1)

    def _answer(self, hidden_states: Tensor, cache: Any) -> Tensor:
        entry = cache.states[self.index] if isinstance(cache, BaseCache) else None
        if not isinstance(entry, MemoryEntry):
            raise StateError(f"a memory cannot be kept in a {type(cache).__name__}; call the whole model, not its base")
        mask = cache.mask(hidden_states.device)
        past = self._kind.with_tensors(entry.past) if entry.past else None
        if isinstance(self.layer, MixtureOfMemories):
            output, state, routing = self.layer(hidden_states, mask, past)
            entry.routing = routing.statistics() if entry.counts_routing else None
        else:
            output, state = self.layer(hidden_states, mask, past)
        entry.result = state.tensors
        return output

    def keeps(self, entry: tuple[Tensor, ...]) -> bool:
        """Say whether tensors have the shapes of a state of this block, for any number of rows."""
        return [tensor.shape[1:] for tensor in entry] == [tensor.shape[1:] for tensor in self._kind.tensors]

    @cached_property
    def _kind(self) -> LinearMemoryState | MixtureState:
        """A state of no rows, which says what the tensors of a state are."""
        with torch.no_grad():
            like = self.layer.o_proj.weight
            if isinstance(self.layer, MixtureOfMemories):
                return self.layer.initial_mixture(0, like)
            return self.layer.initial_state(0, like)
