"""Packed sequences as rows of batches, for chunkwise forms.

Sequences of similar length share a batch. A batch is filled up to its longest row, and no more than doubles the tokens
that are computed.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnemon.ops.state import concatenate, select_rows


class Group(NamedTuple):
    """Some of the packed sequences, as the rows of a batch.

    Attributes:
        tensors: the inputs of these sequences [n, L, ...], L the longest length; beyond a row's end stands anything.
        state: their states.
        mask: True up to the end of each row, [n, L].
        positions: where each token that counts came from, in the order of `mask`'s True values.
        sequences: number of each row among the packed sequences, [n].
    """

    tensors: dict[str, Tensor]
    state: Any
    mask: Tensor
    positions: Tensor
    sequences: Tensor


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Group the numbers of sequences so that in a group the longest is at most twice as long as the shortest."""
    groups: list[list[int]] = []
    for sequence in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and lengths[groups[-1][0]] <= 2 * lengths[sequence]:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def unpack_rows(tensors: dict[str, Tensor], state: Any, cu_seqlens: Tensor) -> list[Group]:
    """Split packed sequences into groups of rows.

    Args:
        tensors: inputs, [1, T, ...].
        state: one row per sequence.
        cu_seqlens: boundaries, [N + 1].

    Returns:
        The groups; every sequence is in exactly one.
    """
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    device = tensors["v"].device
    result = []
    for members in similar_lengths(lengths):
        longest = lengths[members[0]]
        offset = torch.arange(longest, device=device)
        start = torch.tensor([bounds[member] for member in members], device=device)
        mask = offset < torch.tensor([lengths[member] for member in members], device=device)[:, None]
        index = torch.where(mask, start[:, None] + offset, 0)
        rows = {
            name: tensor[0].index_select(0, index.reshape(-1)).reshape(*index.shape, *tensor.shape[2:])
            for name, tensor in tensors.items()
        }
        sequences = torch.tensor(members, device=device)
        result.append(Group(rows, select_rows(state, sequences), mask, index[mask], sequences))
    return result


def pack_rows(groups: list[Group], done: list[tuple[Tensor, Any]], like: Tensor) -> tuple[Tensor, Any]:
    """Put outputs and states of the groups back into the order of the packed sequences.

    Args:
        groups: the groups.
        done: output [n, L, H, V] and state of each group.
        like: values, [1, T, H, V].

    Returns:
        Output [1, T, H, V] and the state, one row per sequence.
    """
    tokens = torch.cat([output[group.mask] for group, (output, _) in zip(groups, done, strict=True)])
    came_from = torch.cat([group.positions for group in groups])
    output = tokens.index_select(0, torch.argsort(came_from)).reshape(like.shape)
    sequences = torch.cat([group.sequences for group in groups])
    return output, select_rows(concatenate([state for _, state in done]), torch.argsort(sequences))
