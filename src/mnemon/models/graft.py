"""Find the blocks of a Hugging Face decoder and join a memory to their attention, without touching the decoder.

The decoder stays exactly as the library built it; for the duration of one call, hooks observe each chosen block's input
and its attention, and add the memory term to the attention's output. What cannot be grafted is refused with the reason.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mnemon.errors import ConfigError

# Called for one block: (index among blocks with memory, block input h, normalised input x, attention output a) -> term.
MemoryTerm = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_STREAMABLE_LAYER_TYPES = ("full_attention", "sliding_attention", "conv")


@dataclass(frozen=True)
class Block:
    """One block of the decoder: its module, its kind ("attention" or "conv") and its attention module, if any."""

    module: nn.Module
    kind: str
    attention: nn.Module | None
    window: int | None


def find_blocks(base: PreTrainedModel) -> list[Block]:
    """Find the decoder's blocks by structure.

    Raises:
        ConfigError: for a decoder a memory cannot be grafted on, with the reason.
    """
    config = base.config
    _refuse_unsupported(config)
    count = config.num_hidden_layers
    lists = [
        module for module in base.get_decoder().children() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1:
        raise ConfigError(f"cannot find the {count} decoder blocks of {type(base).__name__}")
    types = getattr(config, "layer_types", None) or ["full_attention"] * count
    sliding = getattr(config, "sliding_window", None)
    all_sliding = sliding is not None and not getattr(config, "layer_types", None)
    blocks = []
    for module, layer_type in zip(lists[0], types, strict=True):
        if layer_type not in _STREAMABLE_LAYER_TYPES:
            raise ConfigError(f"cannot carry the state of a {layer_type} block ({type(base).__name__}) over segments")
        window = sliding if layer_type == "sliding_attention" or all_sliding else None
        blocks.append(_describe(module, layer_type, window))
    return blocks


def _describe(module: nn.Module, layer_type: str, window: int | None) -> Block:
    if layer_type == "conv":
        return Block(module, "conv", None, None)
    attentions = [
        child
        for child in module.children()
        if "attention" in type(child).__name__.lower() and "norm" not in type(child).__name__.lower()
    ]
    if len(attentions) != 1:
        raise ConfigError(f"cannot find the attention of {type(module).__name__}: {len(attentions)} candidates")
    names = [name for name, _ in module.named_children()]
    if any("post_feedforward" in name for name in names):
        kind = type(module).__name__
        raise ConfigError(f"{kind} normalises after its attention; such decoders are not supported yet")
    return Block(module, "attention", attentions[0], window)


def _refuse_unsupported(config: Any) -> None:
    if config.is_encoder_decoder:
        raise ConfigError(f"{config.model_type} is an encoder-decoder; LM2 needs a decoder-only model")
    if getattr(config, "use_parallel_residual", False):
        raise ConfigError(f"{config.model_type} has parallel residual blocks, which are not supported yet")
    if getattr(config, "rope_parameters", None) is None:
        raise ConfigError(f"{config.model_type} has no rotary positions; learned positions end with their table")
    rope = config.rope_parameters
    rope_types = {rope.get("rope_type")} if "rope_type" in rope else {entry.get("rope_type") for entry in rope.values()}
    for rope_type in ("dynamic", "longrope"):
        if rope_type in rope_types:
            raise ConfigError(f"rope_type {rope_type!r} changes all angles as the text grows and cannot be streamed")


def memory_blocks(blocks: Sequence[Block], memory_layers: Sequence[int] | None) -> list[int]:
    """Return the indices of the blocks that get a memory; None = all with attention.

    Raises:
        ConfigError: if a block without attention is named.
    """
    if memory_layers is None:
        return [index for index, block in enumerate(blocks) if block.attention is not None]
    for index in memory_layers:
        if blocks[index].attention is None:
            able = [i for i, block in enumerate(blocks) if block.attention is not None]
            raise ConfigError(f"memory_layers names block {index}, which has no attention; blocks with one: {able}")
    return list(memory_layers)


@contextlib.contextmanager
def attached(blocks: Sequence[Block], indices: Sequence[int], term: MemoryTerm) -> Iterator[None]:
    """For the duration of the context, add `term` to the attention output of the blocks `indices`.

    Hooks live only inside the context: a copied or pickled model carries none, and no call can meet another's.
    """
    handles = []
    for order, index in enumerate(indices):
        handles += _attach(blocks[index], order, term)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(block: Block, order: int, term: MemoryTerm) -> list[Any]:
    assert block.attention is not None
    seen: dict[str, Tensor] = {}

    def remember_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["h"] = args[0] if args else kwargs["hidden_states"]

    def join(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        attended = output[0] if isinstance(output, tuple) else output
        joined = attended + term(order, seen["h"], x, attended)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    return [
        block.module.register_forward_pre_hook(remember_input, with_kwargs=True),
        block.attention.register_forward_hook(join, with_kwargs=True),
    ]
