"""Find the blocks of a Hugging Face decoder and join a memory to their attention, without touching the decoder.

Everything is found by structure: the list of blocks by its length, the attention by its class, the place where its
output meets the residual stream by running two tokens and watching which tensor goes where. The decoder stays exactly
as the library built it; for the duration of one call, hooks observe each chosen block's input and its attention, and
add the memory term to the attention branch. What cannot be grafted is refused with the reason.
"""

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mnemon.errors import ConfigError

# Called for one block: (index among blocks with memory, block input h, normalised input x, attention branch a), returns
# the branch with the memory term added.
MemoryTerm = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_STREAMABLE_LAYER_TYPES = ("full_attention", "sliding_attention", "conv")
_ATTENTION_NAMES = ("self_attn", "self_attention", "attention", "attn")
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Block:
    """One block of the decoder.

    Attributes:
        module: the block.
        kind: "attention", "conv" or "memory" (linear memories in the place of the attention).
        attention: its attention module, or what stands in its place, if any.
        window: tokens its attention sees, itself included; None = all.
        native_window: whether the decoder itself has this window, so that its own masks know it.
    """

    module: nn.Module
    kind: str
    attention: nn.Module | None
    window: int | None
    native_window: bool = True

    @property
    def has_keys(self) -> bool:
        """Whether the block keeps keys and values."""
        return self.kind == "attention"


@dataclass(frozen=True)
class Join:
    """Where the memory term enters a block.

    Attributes:
        norm: the norm between attention and residual stream (OLMo2, Gemma 2 and 3), whose output the term is added to;
            None = the term is added to the attention's own output.
        raw_input: whether the attention gets the residual stream without a norm before it (OLMo2).
    """

    norm: nn.Module | None
    raw_input: bool


@dataclass(frozen=True)
class Graft:
    """What is known of a decoder's structure.

    Attributes:
        blocks: its blocks in order.
        learned_positions: size of its table of learned positions; None = rotary positions.
    """

    blocks: list[Block]
    learned_positions: int | None


def find_graft(base: PreTrainedModel, blocks_path: str | None = None, attention_name: str | None = None) -> Graft:
    """Find the decoder's blocks by structure.

    Args:
        base: a causal language model.
        blocks_path: the blocks by hand, as a dotted path from `base`, such as `model.layers`.
        attention_name: the attention inside a block by hand, such as `self_attn`.
    Raises:
        ConfigError: for a decoder a memory cannot be grafted on, with the reason.
    """
    config = base.config
    if getattr(config, "add_cross_attention", False):
        raise ConfigError(f"{config.model_type} has an encoder to attend to; LM2 needs a decoder-only model")
    count = config.num_hidden_layers
    modules = _block_modules(base, count, blocks_path)
    types = getattr(config, "layer_types", None) or ["full_attention"] * count
    sliding = getattr(config, "sliding_window", None)
    all_sliding = sliding is not None and not getattr(config, "layer_types", None)
    blocks = []
    for module, layer_type in zip(modules, types, strict=True):
        if layer_type not in _STREAMABLE_LAYER_TYPES:
            raise ConfigError(f"cannot carry the state of a {layer_type} block ({type(base).__name__}) over segments")
        if layer_type == "conv":
            blocks.append(Block(module, "conv", None, None))
            continue
        window = sliding if layer_type == "sliding_attention" or all_sliding else None
        blocks.append(Block(module, "attention", _attention_of(module, attention_name), window))
    learned_positions = _learned_positions(base)
    # Without them a decoder counts and remembers for itself (TrOCR's, the first GPT), which padding and cuts break.
    for name in ("position_ids", "past_key_values"):
        if name not in inspect.signature(type(base).forward).parameters:
            raise ConfigError(f"{type(base).__name__} takes no {name}, so it cannot read a text in pieces")
    return Graft(blocks, learned_positions)


def decoder_of(base: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal language model that holds the blocks (without the head)."""
    decoder: PreTrainedModel = base.get_decoder()
    has_blocks = any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    # Where `decoder` is the name of something else, such as the head, the library's guess is wrong.
    return decoder if has_blocks else cast(PreTrainedModel, base.base_model)


def _block_modules(base: PreTrainedModel, count: int, blocks_path: str | None) -> list[nn.Module]:
    kind = type(base).__name__
    if blocks_path is not None:
        try:
            named: Any = base.get_submodule(blocks_path)
            if len(named) == count:
                return list(named)
            found = f"{len(named)} modules"
        except (AttributeError, TypeError):
            found = "no list of modules"
        raise ConfigError(f"blocks_path={blocks_path!r} of {kind} is {found}; expected its {count} decoder blocks")
    decoder = decoder_of(base)
    lists = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise ConfigError(
            f"cannot find the decoder blocks of {kind}: looked for one nn.ModuleList of num_hidden_layers={count} "
            f"modules in {type(decoder).__name__}, found {len(outermost)}; name it by hand, such as "
            "blocks_path='model.layers'"
        )
    return list(outermost[0])


def _attention_of(block: nn.Module, attention_name: str | None) -> nn.Module:
    kind = type(block).__name__
    children = dict(block.named_children())
    if attention_name is not None:
        if attention_name not in children:
            raise ConfigError(f"attention_name={attention_name!r} is not in {kind}, which has {', '.join(children)}")
        return children[attention_name]
    found = {
        name: child
        for name, child in children.items()
        if "attention" in type(child).__name__.lower() and "norm" not in type(child).__name__.lower()
    }
    if len(found) > 1:
        found = {name: child for name, child in found.items() if name in _ATTENTION_NAMES}
    if len(found) != 1:
        raise ConfigError(
            f"cannot find the attention of {kind}: looked for one child whose class is called ...Attention, found "
            f"{len(found)} among {', '.join(children)}; name it by hand, such as attention_name='self_attn'"
        )
    return next(iter(found.values()))


def num_values_taken(block: nn.Module, name: str) -> int:
    """Return how many values a block takes apart from what its child of a name returns: two almost everywhere.

    Some blocks (JetMoE, GPT-NeoX Japanese) take three. Only their source says so: `a, b, c = self.name(...)`.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(block).forward)))
    except (OSError, TypeError, SyntaxError):  # a class that was not read from a file
        return 2
    taken = [
        len(node.targets[0].elts)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == f"self.{name}"
    ]
    return max(taken, default=2)


def _learned_positions(base: PreTrainedModel) -> int | None:
    """Return the size of the table of learned positions, or None for rotary positions.

    Raises:
        ConfigError: for rotary positions that change with the length of the text, and for any other kind.
    """
    config, decoder = base.config, decoder_of(base)
    rope = getattr(config, "rope_parameters", None)
    if rope:
        entries = [rope] if "rope_type" in rope else [entry for entry in rope.values() if isinstance(entry, dict)]
        for rope_type in ("dynamic", "longrope"):
            if any(entry.get("rope_type") == rope_type for entry in entries):
                raise ConfigError(
                    f"rope_type {rope_type!r} changes all angles as the text grows and cannot be streamed"
                )
    if inverse_frequencies(decoder):
        return None
    tokens = base.get_input_embeddings()
    tables = [module for module in decoder.children() if isinstance(module, nn.Embedding) and module is not tokens]
    size = getattr(config, "max_position_embeddings", None)
    if size is not None and len(tables) == 1 and tables[0].num_embeddings >= size:
        return int(size)
    raise ConfigError(
        f"cannot tell the positions of {type(base).__name__}: looked in {type(decoder).__name__} for rotary "
        f"frequencies (a buffer inv_freq) or one table of learned positions, found {len(tables)} tables; a memory "
        "needs one of them"
    )


def inverse_frequencies(decoder: nn.Module) -> list[Tensor]:
    """Return the rotary inverse frequencies [rotated width / 2] that the decoder keeps as buffers."""
    return [
        buffer
        for name, buffer in decoder.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]


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


def find_joins(blocks: Sequence[Block], run: Callable[[], Any]) -> list[Join | None]:
    """Find where each block's attention output goes, by watching one run.

    Args:
        blocks: the decoder's blocks.
        run: runs the decoder on a few tokens, without dropout.
    Returns:
        One entry per block, None for a block without attention.
    """
    watched = [None if block.attention is None else _Watch(block, block.attention) for block in blocks]
    try:
        run()
        return [None if watch is None else watch.join() for watch in watched]
    finally:
        for watch in watched:
            if watch is not None:
                watch.remove()


class _Watch:
    """Hooks on one block that notice what its attention and its norms are given."""

    def __init__(self, block: Block, attention: nn.Module) -> None:
        self.input: Tensor | None = None
        self.attention_input: Tensor | None = None
        self.output: Tensor | None = None
        self.norm: nn.Module | None = None
        self.handles = [
            block.module.register_forward_pre_hook(self._see_block, with_kwargs=True),
            attention.register_forward_hook(self._see_attention, with_kwargs=True),
        ]
        for child in block.module.children():
            if child is not attention:
                self.handles.append(child.register_forward_pre_hook(self._see_child))

    def _see_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.input = _hidden(args, kwargs)

    def _see_attention(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.attention_input, self.output = _hidden(args, kwargs), _first(output)

    def _see_child(self, child: nn.Module, args: tuple[Any, ...]) -> None:
        # A dropout passes its input on unchanged; a norm that gets exactly the attention's output comes before the sum.
        if (
            args
            and self.output is not None
            and _is_same(args[0], self.output)
            and any(True for _ in child.parameters())
        ):
            self.norm = child

    def join(self) -> Join:
        """Return what was seen."""
        assert self.input is not None
        assert self.attention_input is not None
        return Join(self.norm, _is_same(self.input, self.attention_input))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


@contextlib.contextmanager
def attached(
    blocks: Sequence[Block], joins: Sequence[Join | None], indices: Sequence[int], term: MemoryTerm
) -> Iterator[None]:
    """For the duration of the context, let `term` replace the attention branch of the blocks `indices` by its result.

    Hooks live only inside the context: a copied or pickled model carries none, and no call can meet another's.
    """
    handles: list[Any] = []
    try:
        for order, index in enumerate(indices):
            join = joins[index]
            assert join is not None
            handles += _attach(blocks[index], join, order, term)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(block: Block, join: Join, order: int, term: MemoryTerm) -> list[Any]:
    assert block.attention is not None
    seen: dict[str, Tensor] = {}

    def see_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["h"] = _hidden(args, kwargs)

    def see_attention(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = _hidden(args, kwargs)
        seen["x"] = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=_NORM_EPS) if join.raw_input else x

    def add_term(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        branch = _first(output)
        joined = term(order, seen.pop("h"), seen.pop("x"), branch)
        return type(output)([joined, *output[1:]]) if isinstance(output, (tuple, list)) else joined

    return [
        block.module.register_forward_pre_hook(see_block, with_kwargs=True),
        block.attention.register_forward_hook(see_attention, with_kwargs=True),
        (join.norm or block.attention).register_forward_hook(add_term),
    ]


@contextlib.contextmanager
def around_blocks(
    blocks: Sequence[Block],
    enter: Callable[[int, Tensor], Tensor],
    leave: Callable[[int, Tensor], None] | None,
) -> Iterator[None]:
    """For the duration of the context, change what every block is given, and look at what it returns.

    Args:
        blocks: the decoder's blocks.
        enter: called with a block's index and its input [B, T, D]; returns the input that it gets.
        leave: called with a block's index and its output [B, T, D]; None = nobody looks.
    """
    handles: list[Any] = []
    try:
        for index, block in enumerate(blocks):
            handles += _surround(block.module, index, enter, leave)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _surround(
    module: nn.Module,
    index: int,
    enter: Callable[[int, Tensor], Tensor],
    leave: Callable[[int, Tensor], None] | None,
) -> list[Any]:
    def replace_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = enter(index, _hidden(args, kwargs))
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def see_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert leave is not None
        leave(index, _first(output))

    handles: list[Any] = [module.register_forward_pre_hook(replace_input, with_kwargs=True)]
    return handles if leave is None else [*handles, module.register_forward_hook(see_output)]


@contextlib.contextmanager
def last_hidden_states(base: PreTrainedModel) -> Iterator[list[Tensor]]:
    """For the duration of the context, note what the decoder hands to its head: [B, T, D], after the final norm."""
    found: list[Tensor] = []
    handle = decoder_of(base).register_forward_hook(lambda _, args, output: found.append(output[0]))
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def blocks_called(blocks: Sequence[Block], masks: Mapping[int, Tensor | None], recompute: bool) -> Iterator[None]:
    """For the duration of the context, let blocks be called in another way.

    Args:
        blocks: the decoder's blocks.
        masks: what some of them, by index, hand their attention in place of the decoder's own mask.
        recompute: whether their activations are recomputed in the backward pass.
    """
    # Libraries that place blocks on devices have put a forward of theirs there.
    found: list[Any] = [vars(block.module).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        forward = block.module.forward
        if index in masks and block.attention is not None:
            forward = _with_mask(forward, block.attention, masks[index])
        block.module.forward = partial(checkpoint, forward, use_reentrant=False) if recompute else forward
    try:
        yield
    finally:
        for block, own in zip(blocks, found, strict=True):
            if own is None:
                del block.module.forward  # the class's own shows again
            else:
                block.module.forward = own


def _with_mask(forward: Any, attention: nn.Module, mask: Tensor | None) -> Any:
    """Return a block's forward in which the attention is called with a mask of ours."""

    def replace_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": mask}

    def run(*args: Any, **kwargs: Any) -> Any:
        handle = attention.register_forward_pre_hook(replace_mask, with_kwargs=True)
        try:
            return forward(*args, **kwargs)
        finally:
            handle.remove()

    return run


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states a block or an attention is called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first


def _is_same(one: Any, other: Tensor) -> bool:
    """Whether two tensors are the same values in the same place (a view or an untouched hand-over)."""
    if one is other:
        return True
    if not isinstance(one, Tensor) or one.device.type == "meta" or one.numel() != other.numel():
        return False
    return one.data_ptr() == other.data_ptr()
