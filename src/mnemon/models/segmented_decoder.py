"""Run a Hugging Face decoder segment by segment, with everything it carries as a value.

What every memory around a decoder needs and what has nothing to do with the kind of memory: one call of the untouched
decoder per segment, ragged rows, attention spans and sinks, a bounded cache. A memory adds hooks for the duration of a
call (`mnemon.models.graft`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mnemon.errors import ConfigError, ShapeError, StateError
from mnemon.layers.routing import RoutingStatistics
from mnemon.models.base_cache import BaseCache, Columns, KeyValueLayer, PastView
from mnemon.models.decoder_state import DecoderState
from mnemon.models.graft import (
    Block,
    Graft,
    Join,
    blocks_called,
    decoder_of,
    find_graft,
    find_joins,
    inverse_frequencies,
)
from mnemon.models.masks import (
    FarSinks,
    Reach,
    as_attention_mask,
    as_columns,
    call_key_positions,
    columns_to_keep,
    far_sinks,
    reach_of,
    takes_numbers_once,
    visibility,
)
from mnemon.models.memory_mixer import MemoryMixer
from mnemon.models.rotary import PROBE_POSITIONS, KeyRotation, find_rotation
from mnemon.models.segments import SegmentCall, gather_columns, plan_calls

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_PRECISION_TOLERANCE = 0.5  # rounding and flipped experts stay far below; a wrong graft is off by about 1


class _Sight(NamedTuple):
    """What one call sees through one reach.

    Attributes:
        keys: positions of all key columns, [B, cached + width].
        visible: which columns each token sees (`masks.visibility`), far sinks first if there are any.
        sinks: where the far sinks are, or None where every sink is at its own distance.
    """

    keys: np.ndarray
    visible: np.ndarray | None
    sinks: FarSinks | None


class SegmentedDecoder:
    """A decoder and how to run it one segment at a time.

    Args:
        base: a causal language model of Hugging Face.
        segment_length: tokens C per segment.
        span: tokens the attention sees, itself included; None = all.
        sinks: first tokens that stay visible beyond the span.
        blocks_path: where the blocks are, if they cannot be found.
        attention_name: what the attention is called, if it cannot be found.
        graft: the decoder's structure, where it is known.
    Raises:
        ConfigError: if the decoder is of a kind that cannot be run this way.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        segment_length: int,
        span: int | None = None,
        sinks: int = 0,
        blocks_path: str | None = None,
        attention_name: str | None = None,
        graft: Graft | None = None,
    ) -> None:
        self.base = base
        self.segment_length = segment_length
        self.graft = find_graft(base, blocks_path, attention_name) if graft is None else graft
        reach_of_block = [
            reach_of(block.window, span, sinks, block.native_window) if block.has_keys else None
            for block in self.graft.blocks
        ]
        # The decoder's own masks are one per layer type; blocks that were altered may differ from their type.
        self.hands_out_masks = any(block.kind == "memory" for block in self.graft.blocks)
        self.reaches: list[Reach] = list(dict.fromkeys(reach for reach in reach_of_block if reach is not None))
        self.reach_index = [None if reach is None else self.reaches.index(reach) for reach in reach_of_block]
        self._joins: list[Join | None] = []
        self._rotations: list[KeyRotation | None] = []

    @property
    def blocks(self) -> list[Block]:
        """The decoder's blocks."""
        return self.graft.blocks

    @property
    def joins(self) -> list[Join | None]:
        """Where a memory term enters each block; known after `prepare`."""
        return self._joins

    def prepare(self) -> None:
        """Run a few tokens, once, to see where attention outputs go and, if there are sinks, how keys are rotated.

        Raises:
            ConfigError: if a block keeps its state anywhere but in its keys and values, or keys cannot be rotated.
        """
        if not self._joins:
            self._joins = self._find_joins()
            self._rotations = self._find_rotations()

    def _find_joins(self) -> list[Join | None]:
        caches: list[BaseCache] = []
        joins = find_joins(self.blocks, lambda: caches.append(self._probe(np.array([[0, 1]]))))
        for index, layer in enumerate(caches[0].states):
            if isinstance(layer, KeyValueLayer) and not layer.new:
                raise ConfigError(
                    f"block {index} of {type(self.base).__name__} keeps no keys and values of its own, so its state "
                    "cannot be carried over segments"
                )
        return joins

    def _find_rotations(self) -> list[KeyRotation | None]:
        if self.graft.learned_positions is not None or not any(reach.sinks for reach in self.reaches):
            return [None] * len(self.blocks)  # a learned position is in the token's embedding and stays with it
        before, after = (self._probe(np.array([[position]])) for position in PROBE_POSITIONS)
        candidates = inverse_frequencies(decoder_of(self.base))
        rotations: list[KeyRotation | None] = []
        for index, reach in enumerate(self.reach_index):
            if reach is None or self.reaches[reach].sinks == 0:
                rotations.append(None)
                continue
            one, two = (cache.states[index] for cache in (before, after))
            assert isinstance(one, KeyValueLayer)
            assert isinstance(two, KeyValueLayer)
            rotation = find_rotation(one.new[0], two.new[0], candidates)
            if rotation is None:
                raise ConfigError(
                    f"the keys of {type(self.base).__name__} cannot be moved to another position, which attention "
                    "sinks need; set attention_sinks=0"
                )
            rotations.append(rotation)
        return rotations

    def _probe(self, positions: np.ndarray) -> BaseCache:
        """Run one row of tokens at given positions [1, n], without dropout, and return the cache."""
        call = SegmentCall(np.zeros_like(positions), np.array([positions.shape[1]]), positions[:, 0], np.array([False]))
        cache = BaseCache(((),) * len(self.blocks), [block.kind for block in self.blocks], call)
        device = _embedding(self.base).device
        ids = torch.arange(1, positions.shape[1] + 1, device=device)[None] % self.base.config.vocab_size
        with torch.no_grad(), evaluating(self.base):
            self.base(
                input_ids=ids,
                position_ids=torch.from_numpy(positions).to(device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return cache

    def verify(self, whole: PreTrainedModel | None = None) -> None:
        """Compare a ragged batch read in two calls with the same rows read by the decoder alone.

        Args:
            whole: the model that the decoder is a part of, if it is no model by itself.
        Raises:
            ConfigError: if the logits differ, because the decoder has a state or positions that are not understood.
        """
        embedding = _embedding(self.base)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.base.config.vocab_size, (2, 6), generator=generator).to(embedding.device)
        mask = np.array([[True] * 6, [False] * 2 + [True] * 4])
        self.prepare()
        with torch.no_grad(), evaluating(self.base):
            state, found = self.initial_state(2), []
            for half in (slice(0, 3), slice(3, 6)):
                for call in plan_calls(mask[:, half], 3, state.counts, self.segment_length):
                    inputs = gather_columns(ids[:, half], call)
                    logits, state = self.run(inputs, call, state, np.arange(call.width))
                    found.append([logits[row, : call.lengths[row]] for row in range(2)])
            model = self.base if whole is None else whole
            alone = [model(input_ids=rows, use_cache=False).logits[0] for rows in (ids[:1], ids[1:, 2:])]
        limit = _TOLERANCE.get(embedding.dtype, _HALF_PRECISION_TOLERANCE)
        for row in range(2):
            joined = torch.cat([piece[row] for piece in found])
            difference = (joined - alone[row]).float().square().mean().sqrt()
            scale = alone[row].float().square().mean().sqrt()
            if not bool(difference <= limit * scale + limit * 1e-3):
                raise ConfigError(
                    f"{type(self.base).__name__} gives other logits when a text is read in pieces (difference "
                    f"{float(difference):.2g} at a scale of {float(scale):.2g}), so it cannot be run over segments"
                )

    def initial_state(self, batch_size: int) -> DecoderState:
        """Return the state before the first token."""
        return DecoderState(
            counts=(0,) * batch_size,
            base=((),) * len(self.blocks),
            key_positions=(np.zeros((batch_size, 0), dtype=np.int64),) * len(self.reaches),
        )

    def check_state(self, state: DecoderState) -> None:
        """Refuse a state of another decoder, as far as the shapes of its tensors tell.

        Raises:
            StateError: naming what differs.
        """
        found = (len(state.base), len(state.key_positions))
        expected = (len(self.blocks), len(self.reaches))
        if found != expected:
            raise StateError(
                f"the memory is of another model: {found[0]} blocks with {found[1]} kinds of attention; this one has "
                f"{expected[0]} with {expected[1]}"
            )
        for index, (block, entry) in enumerate(zip(self.blocks, state.base, strict=True)):
            if entry and not _keeps(block, entry):
                shapes = ", ".join(str(list(tensor.shape)) for tensor in entry)
                raise StateError(f"the memory is of another model: block {index} ({block.kind}) keeps no {shapes}")

    @property
    def sees_everything(self) -> bool:
        """Whether a block sees every earlier token, so that what is carried grows with the text."""
        return any(reach.limit is None for reach in self.reaches)

    @property
    def longest_text(self) -> int | None:
        """Tokens that a block which sees every earlier one was made for; None if there is no such block or number."""
        if not self.sees_everything:
            return None
        return getattr(self.base.config, "max_position_embeddings", None)

    def check_positions(self, counts: np.ndarray) -> None:
        """Refuse rows of more tokens than a decoder with learned positions has positions.

        Raises:
            ShapeError: naming both numbers.
        """
        size = self.graft.learned_positions
        if size is not None and counts.max() > size:
            raise ShapeError(
                f"{int(counts.max())} tokens are more than the {size} learned positions of "
                f"{self.base.config.model_type}; shorten the text or choose a decoder with rotary positions"
            )

    def run(
        self,
        inputs: Tensor,
        call: SegmentCall,
        state: DecoderState,
        slots: np.ndarray,
        keep_pieces: bool = False,
        recomputes: bool = False,
        recompute_blocks: bool = False,
    ) -> tuple[Tensor, DecoderState]:
        """Run one call of the decoder, within one segment of every row.

        Args:
            inputs: the call's token ids [B, width] or embeddings [B, width, D].
            call: which tokens these are.
            state: what earlier calls left; not changed.
            slots: columns of the call to compute logits for.
            keep_pieces: carry keys and values as pieces, one per call, so that the backward pass need not keep them
                joined.
            recomputes: whether the caller recomputes the call in the backward pass, and itself decides what is kept.
            recompute_blocks: recompute the activations of each block in the backward pass.
        Returns:
            Logits [B, len(slots), vocabulary] and the new state.
        """
        sights = [self._sight(positions, call, reach) for positions, reach in self._by_reach(state)]
        kinds = [block.kind for block in self.blocks]
        cache = BaseCache(state.base, kinds, call, self._views(sights), state.routing is not None)
        attentions = [block.attention for block in self.blocks if block.attention is not None and block.has_keys]
        masks = self._masks(sights, call, inputs.device)
        with contextlib.ExitStack() as stack:
            if keep_pieces and not recomputes:
                stack.enter_context(cache.keeping_pieces(attentions))
            if self.hands_out_masks or recompute_blocks:
                stack.enter_context(blocks_called(self.blocks, self._masks_of_blocks(masks), recompute_blocks))
            logits: Tensor = self.base(
                **{"input_ids" if inputs.ndim == 2 else "inputs_embeds": inputs},
                attention_mask=self._attention_mask(masks, inputs.device),
                position_ids=call_tensor(call.positions, call, inputs.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=_logits_to_keep(slots, call.width, inputs.device),
            ).logits
        counts = call.starts + call.lengths
        entries, positions = self._carry(state, cache, [sight.keys for sight in sights], counts, keep_pieces)
        routing = None if state.routing is None else joined_statistics(state.routing, cache.routing())
        return logits, DecoderState(tuple(int(count) for count in counts), entries, positions, routing)

    def _by_reach(self, state: DecoderState) -> Iterator[tuple[np.ndarray, Reach]]:
        return zip(state.key_positions, self.reaches, strict=True)

    def _sight(self, past: np.ndarray, call: SegmentCall, reach: Reach) -> _Sight:
        keys = call_key_positions(past, call)
        sinks = None if self.graft.learned_positions is not None else far_sinks(past, call, reach, self.segment_length)
        visible = visibility(keys, call, reach, sinks)
        implementation = self.base.config._attn_implementation or ""
        if visible is not None and "flash" in implementation and reach.native and call.is_uniform and (keys >= 0).all():
            visible = None  # flash attention applies the decoder's own window itself
        return _Sight(keys, visible, sinks)

    def _views(self, sights: list[_Sight]) -> list[PastView | None]:
        """Return how the call sees each block's cached keys and values."""
        views: list[PastView | None] = []
        for block, index in enumerate(self.reach_index):
            sinks = None if index is None else sights[index].sinks
            views.append(None if sinks is None else _SinkView(self._rotations[block], sinks))
        return views

    def _masks(self, sights: list[_Sight], call: SegmentCall, device: torch.device) -> list[Tensor | None] | None:
        """Return a 4-D mask for each reach, None where its attention needs none; None = the decoder makes its own."""
        implementation = self.base.config._attn_implementation or ""
        widths = {sight.keys.shape[1] for sight in sights}
        is_causal = all(sight.visible is None for sight in sights) and len(widths) <= 1
        # The library's own mask over earlier keys is boolean, which every block would turn into numbers.
        own_is_best = widths <= {call.width} or not takes_numbers_once(implementation or None, device)
        if is_causal and own_is_best and not self.hands_out_masks:
            return None
        masks: list[Tensor | None] = []
        for sight in sights:
            shape = (call.width, sight.keys.shape[1])
            # Fused attention alone, without the decoder's mask, knows what is causal where nothing came before.
            knows = "flash" in implementation or (implementation == "sdpa" and shape[0] == shape[1])
            if self.hands_out_masks and sight.visible is None and knows:
                masks.append(None)
            else:
                masks.append(as_attention_mask(sight.visible, shape, implementation or None, self.base.dtype, device))
        return masks

    def _attention_mask(self, masks: list[Tensor | None] | None, device: torch.device) -> Any:
        """Mask for the decoder: None (its own causal mask), a 4-D tensor, or one per layer type."""
        layer_types = getattr(self.base.config, "layer_types", None)
        if self.hands_out_masks:  # a prepared mask keeps the decoder from building its own, which nobody would look at
            unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
            if layer_types is None:
                return unused
            kinds = zip(layer_types, self.blocks, strict=True)
            return {layer_type: None if block.kind == "conv" else unused for layer_type, block in kinds}
        if masks is None:
            return None
        if layer_types is None:
            return masks[0]
        return {
            layer_type: None if index is None else masks[index]
            for layer_type, index in zip(layer_types, self.reach_index, strict=True)
        }

    def _masks_of_blocks(self, masks: list[Tensor | None] | None) -> dict[int, Tensor | None]:
        """Return the masks that blocks are to hand their attention in place of the decoder's, by block."""
        if masks is None or not self.hands_out_masks:
            return {}
        return {block: masks[index] for block, index in enumerate(self.reach_index) if index is not None}

    def _carry(
        self, state: DecoderState, cache: BaseCache, keys: list[np.ndarray], counts: np.ndarray, keep_pieces: bool
    ) -> tuple[tuple[tuple[Tensor, ...], ...], tuple[np.ndarray, ...]]:
        """Return what every block carries on, and the positions of the key columns that are left."""
        device = _embedding(self.base).device
        chosen: list[Columns] = []
        kept_pieces: list[list[int]] = []
        positions = []
        for index, (key, reach) in enumerate(zip(keys, self.reaches, strict=True)):
            columns = columns_to_keep(key, counts, reach)
            if keep_pieces:
                pieces = state.base[self.reach_index.index(index)][0::2]
                kept, columns = _whole_pieces(columns, [piece.shape[-2] for piece in pieces], key.shape[1])
                kept_pieces.append(kept)
            else:
                chosen.append(as_columns(columns, device))
            positions.append(key[:, columns])
        entries = []
        for layer, reach_index in zip(cache.states, self.reach_index, strict=True):
            if not isinstance(layer, KeyValueLayer):
                entries.append(layer.result)
            else:
                assert reach_index is not None
                entries.append(
                    layer.pieces(kept_pieces[reach_index]) if keep_pieces else layer.selected(chosen[reach_index])
                )
        return tuple(entries), tuple(positions)


def _keeps(block: Block, entry: tuple[Tensor, ...]) -> bool:
    """Say whether a block could keep these tensors: keys and values [B, H, T, d], or a state of its own."""
    if isinstance(block.attention, MemoryMixer):
        return block.attention.keeps(entry)
    return len(entry) == 1 if block.kind == "conv" else all(tensor.ndim == 4 for tensor in entry)


def joined_statistics(
    before: tuple[RoutingStatistics, ...], now: tuple[RoutingStatistics, ...]
) -> tuple[RoutingStatistics, ...]:
    """Return the sums of two stretches of tokens; () stands for no tokens."""
    if not before or not now:
        return before or now
    return tuple(one.plus(two) for one, two in zip(before, now, strict=True))


def _whole_pieces(columns: np.ndarray, widths: list[int], total: int) -> tuple[list[int], np.ndarray]:
    """Return which cached pieces hold a needed column, and all columns of these and of the call's own piece."""
    edges = np.cumsum([0, *widths])
    kept = [i for i in range(len(widths)) if ((columns >= edges[i]) & (columns < edges[i + 1])).any()]
    runs = [np.arange(edges[i], edges[i + 1]) for i in kept]
    return kept, np.concatenate([*runs, np.arange(edges[-1], total)])


def call_tensor(values: np.ndarray, call: SegmentCall, device: torch.device) -> Tensor:
    """Put per-token numbers [B, width] on the device, as one row where all rows agree."""
    return torch.from_numpy(values[:1] if call.is_uniform else values).to(device)


class _SinkView:
    """How a block sees its cached sinks: moved on by its rotation, in place or as a second copy (a `PastView`)."""

    def __init__(self, rotation: KeyRotation | None, sinks: FarSinks) -> None:
        self.rotation = rotation
        self.sinks = sinks
        self.width = sinks.is_sink.shape[1]
        self.second_copy = sinks.second_copy

    def moved(self, head: Tensor) -> Tensor:
        """Return the keys [B, H, width, d] at their new positions; columns that are no sinks stay as they are."""
        if self.rotation is None:
            return head
        moved = self.rotation(head, self.sinks.shift)
        if self.second_copy or self.sinks.is_sink.all():
            return moved
        chosen = torch.from_numpy(self.sinks.is_sink).to(head.device)[:, None, :, None]
        return torch.where(chosen, moved, head)


def _logits_to_keep(slots: np.ndarray, width: int, device: torch.device) -> int | Tensor:
    """Return Hugging Face's `logits_to_keep` for the columns `slots` of a call."""
    if len(slots) == width:
        return 0
    if len(slots) and len(slots) == width - slots[0]:
        return len(slots)
    return torch.from_numpy(slots).to(device)


def _embedding(base: PreTrainedModel) -> Tensor:
    weight: Any = base.get_input_embeddings().weight
    return cast(Tensor, weight)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, so that nothing is drawn at random, and every module back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
