"""States of update rules as values: a tensor or a NamedTuple of tensors, handled alike."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mnemon.ops.declaration import Dimensions


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gates and state for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def leaves(state: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a state, in order."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def rebuild(like: Any, tensors: Sequence[Tensor]) -> Any:
    """Return a state of the same kind as `like` made of `tensors`, in the order of `leaves`."""
    return tensors[0] if isinstance(like, Tensor) else type(like)(*tensors)


def combine(function: Callable[..., Tensor], *states: Any) -> Any:
    """Apply a function to the corresponding tensors of one or more states and return a state of the same kind."""
    if isinstance(states[0], Tensor):
        return function(*states)
    return type(states[0])(*(function(*tensors) for tensors in zip(*states, strict=True)))


def concatenate(states: list[Any]) -> Any:
    """Join states of several groups of sequences into one state with all their rows."""
    return states[0] if len(states) == 1 else combine(lambda *rows: torch.cat(rows), *states)


def select_rows(state: Any, rows: Tensor) -> Any:
    """Return the state of some sequences, by their row numbers [N]."""
    return combine(lambda tensor: tensor.index_select(0, rows), state)


def empty_matrix(dimensions: Dimensions, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return the state of a rule whose memory is one matrix S per head and starts empty: zeros [N, H, K, V]."""
    sequences, heads, key_dim, value_dim, _ = dimensions
    return torch.zeros(sequences, heads, key_dim, value_dim, dtype=dtype, device=device)
