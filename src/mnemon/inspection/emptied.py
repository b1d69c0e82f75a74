"""Read with a part of a memory emptied: what a model says when that part remembers nothing.

Linear memories stand where attention stood: a block whose memories were silenced could not look at the sentence it is
reading, whatever had been remembered. So a memory is knocked out by its content. In every call of the model it answers
as if it had held nothing before that call, while what it holds goes on as ever: no state changes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnemon.layers.memory_layer import LinearMemoryState, MemoryLayer
from mnemon.layers.mixture_of_memories import MixtureOfMemories, MixtureState
from mnemon.models.memory_mixer import MemoryMixer


def memory_mixers(model: nn.Module) -> list[MemoryMixer]:
    """Return what stands in the place of attention in the blocks with linear memories, in block order."""
    return [module for module in model.modules() if isinstance(module, MemoryMixer)]


def num_memories(layer: MemoryLayer) -> int:
    """Return the memories of a layer, the shared one included."""
    return layer.total if isinstance(layer, MixtureOfMemories) else 1


@contextlib.contextmanager
def emptied(mixers: Mapping[MemoryMixer, Sequence[int]]) -> Iterator[None]:
    """For the duration of the context, let memories answer as if they had held nothing before the call.

    The rule's state is that before the first token. The tail of the convolution, the clocks and the router stay, so
    that the same tokens go to the same memories. In the first block concerned, memories answer exactly what they would
    without their past; later blocks read what follows from that.

    Args:
        mixers: for blocks with linear memories, the memories concerned.
    """
    handles = [mixer.layer.register_forward_hook(_answer_emptied(memories)) for mixer, memories in mixers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _answer_emptied(memories: Sequence[int]) -> Callable[..., Any]:
    """Return a hook that replaces a layer's answer, and leaves the state it returns as it was."""

    def answer(layer: MemoryLayer, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        x, mask, past = (*args, None, None)[:3]
        if past is None:
            return None
        return (layer.forward(x, mask, without(past, first_state(layer, x), memories))[0], *output[1:])

    return answer


def first_state(layer: MemoryLayer, x: Tensor) -> Any:
    """Return the state of a layer before the first of the tokens x [B, T, D]."""
    if isinstance(layer, MixtureOfMemories):
        return layer.initial_mixture(len(x), x)
    return layer.initial_state(len(x), x)


def without(held: Any, empty: Any, memories: Sequence[int]) -> Any:
    """Return a state in which some memories hold what they held before the first token.

    Args:
        held: the state of a layer.
        empty: its state before the first token.
        memories: the memories concerned; 0 where there is only one.
    """
    if isinstance(held, LinearMemoryState):
        return _replaced(held, empty, torch.tensor([0 in memories], device=held.position.device))
    assert isinstance(held, MixtureState)
    chosen = torch.zeros(1, held.memories.position.shape[1], dtype=torch.bool, device=held.tokens.device)
    chosen[:, list(memories)] = True
    return held._replace(memories=_replaced(held.memories, empty.memories, chosen))


def _replaced(held: LinearMemoryState, empty: LinearMemoryState, chosen: Tensor) -> LinearMemoryState:
    """Replace the rule's numbers where `chosen`, [1] or [1, M]; its counters, the tail and the position stay."""
    tail, *memory, position = held.tensors
    pairs = zip(memory, empty.tensors[1:-1], strict=True)
    new = [
        torch.where(chosen.reshape(*chosen.shape, *[1] * (old.ndim - chosen.ndim)), start, old)
        if old.is_floating_point()
        else old
        for old, start in pairs
    ]
    return held.with_tensors([tail, *new, position])
