"""Which tensors of ours hold the same numbers as which tensors of the published formats.

The formats are described in `mnemon.models.mom_formats`; `docs/convert.md` has the same as a table.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mnemon.models.configuration_mom import MoMConfig

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Correspondence:
    """Tensors of ours and of a published format that hold the same numbers.

    Attributes:
        ours: names of ours.
        theirs: names of theirs.
        join: from theirs to ours, in the order of the names.
        part: from ours to theirs.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    join: Callable[[Tensors], Tensors] = list
    part: Callable[[Tensors], Tensors] = list


def correspondences(
    config: MoMConfig, *, several: bool, tied: bool, fused_feed_forward: bool = False
) -> list[Correspondence]:
    """Return what corresponds to every tensor of a model.

    Args:
        config: the model's configuration.
        several: whether the format is of several memories with a router, not of a single one.
        tied: whether the head is the embedding.
        fused_feed_forward: whether the format keeps the feed-forward's gate and up projections as one matrix.
    """
    table = [
        _same("base.model.embed_tokens.weight", "model.embeddings.weight"),
        _same("base.model.norm.weight", "model.norm.weight"),
    ]
    if not tied:
        table.append(_same("base.lm_head.weight", "lm_head.weight"))
    for index in range(config.num_hidden_layers):
        ours, theirs = f"base.model.layers.{index}", f"model.layers.{index}"
        table += [
            _same(f"{ours}.input_layernorm.weight", f"{theirs}.attn_norm.weight"),
            _same(f"{ours}.post_attention_layernorm.weight", f"{theirs}.mlp_norm.weight"),
            *_memories(config, f"{ours}.self_attn.layer", f"{theirs}.attn", several),
            *_feed_forward(f"{ours}.mlp", f"{theirs}.mlp", fused_feed_forward),
        ]
    return table


def _memories(config: MoMConfig, ours: str, theirs: str, several: bool) -> Iterator[Correspondence]:
    """Yield what corresponds to one memory layer."""
    for name, published in (
        ("q_proj.weight", "q_proj.weight"),
        ("gates.g.log_rate", "A_log"),
        ("gates.g.up.bias", "dt_bias"),
        ("output_gate.weight", "g_proj.weight"),
        ("norm_weight", "o_norm.weight"),
        ("o_proj.weight", "o_proj.weight"),
    ):
        yield _same(f"{ours}.{name}", f"{theirs}.{published}")
    if several:
        yield _same(f"{ours}.router.logits.weight", f"{theirs}.gate.weight")
    if config.conv_size:
        keys = config.num_heads * config.head_dim
        published_convs = tuple(f"{theirs}.{stream}_conv1d.weight" for stream in "qkv")
        yield Correspondence((f"{ours}.conv.weight",), published_convs, _join_convolutions, partial(_part_rows, keys))
    stacked = several and not config.single_kv_proj
    for name, letter in (("k_proj", "k"), ("v_proj", "v"), ("gates.g.up", "a"), ("gates.beta.up", "b")):
        names = _of_memories(config, theirs, letter, several)
        join, part = (_stack, _unstack) if stacked else (list, list)
        yield Correspondence((f"{ours}.{name}.weight",), names, join, part)


def _of_memories(config: MoMConfig, theirs: str, letter: str, several: bool) -> tuple[str, ...]:
    """Return the names of one projection of all memories, the shared memory last."""
    if not several:
        return (f"{theirs}.{letter}_proj.weight",)
    shared = (f"{theirs}.shared_{letter}.weight",)
    if config.single_kv_proj:
        return shared
    routed = tuple(f"{theirs}.{letter}_proj.{number}.weight" for number in range(config.num_memories))
    return routed + shared if config.shared_memory else routed


def _feed_forward(ours: str, theirs: str, fused: bool) -> Iterator[Correspondence]:
    yield _same(f"{ours}.down_proj.weight", f"{theirs}.down_proj.weight")
    names = tuple(f"{ours}.{name}.weight" for name in ("gate_proj", "up_proj"))
    if fused:
        yield Correspondence(names, (f"{theirs}.gate_proj.weight",), _halves, _rows)
    else:
        for name, published in zip(names, ("gate_proj", "up_proj"), strict=True):
            yield _same(name, f"{theirs}.{published}.weight")


def _same(ours: str, theirs: str) -> Correspondence:
    return Correspondence((ours,), (theirs,))


def _stack(tensors: Tensors) -> Tensors:
    return [torch.stack(list(tensors))]


def _unstack(tensors: Tensors) -> Tensors:
    return [tensor.clone() for tensor in tensors[0]]


def _rows(tensors: Tensors) -> Tensors:
    return [torch.cat(list(tensors))]


def _halves(tensors: Tensors) -> Tensors:
    return [half.clone() for half in tensors[0].chunk(2)]


def _join_convolutions(tensors: Tensors) -> Tensors:
    return [torch.cat([tensor.squeeze(1) for tensor in tensors])]


def _part_rows(keys: int, tensors: Tensors) -> Tensors:
    (weight,) = tensors
    return [rows.unsqueeze(1).clone() for rows in weight.split([keys, keys, len(weight) - 2 * keys])]
