"""What all our models do alike around a decoder: inputs checked, one call of any length, generation from a memory."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init

from mnemon.errors import ConfigError, ShapeError, StateError
from mnemon.layers.associative_memory import AssociativeMemory
from mnemon.layers.memory_bank import MemoryBank
from mnemon.layers.memory_layer import MemoryLayer
from mnemon.models.composite_config import CompositeConfig
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.graft import Block
from mnemon.models.pending import Backlog, as_batch
from mnemon.models.provenance import Origin, check_origin
from mnemon.models.segmented_decoder import SegmentedDecoder, evaluating
from mnemon.models.segments import ColumnCollector, SegmentCall, count_calls, gather_columns, host_mask, plan_calls
from mnemon.models.state import MemoryCache, MemoryState

_INITIALIZER_RANGE = 0.02  # the usual one, for a decoder whose configuration has none


class SegmentRunner(Protocol):
    """Runs the segments of one forward pass; `run` is a pure function of its arguments and the parameters."""

    def frame(self, call: SegmentCall, writes: bool) -> SegmentCall:
        """Return the call as the decoder makes it, which may hold more than its tokens."""

    def run(self, inputs: Tensor, call: Any, state: Any, slots: np.ndarray, writes: bool) -> tuple[Tensor, Any]:
        """Return the logits [B, len(slots), V] of one call as `frame` made it, and the new state."""


# Reads an input: (inputs [B, T(, D)], mask, state, wanted columns, whether the state is carried on) -> logits, state.
Reader = Callable[[Tensor, np.ndarray | None, Any, np.ndarray | None, bool], tuple[Tensor, Any]]


class MemoryModel(PreTrainedModel, GenerationMixin):
    """A causal language model that carries a memory from call to call.

    The decoder lives under `base.`; a subclass says what is carried (`_blank_state`, `_check_state`) and how an input
    is read (`_stream`). `position_ids` are accepted for compatibility and not used: positions count real tokens per
    row, whatever the padding.
    """

    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # a memory cannot be rolled back, so assisted generation is refused by the library
    _skip_keys_device_placement = {"past_key_values"}  # noqa: RUF012 (the library declares it per instance)

    base: PreTrainedModel
    segmented: SegmentedDecoder

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: weights get their first values as in the library's own models, parameter by parameter.

        Of other code the library believes that a module without parameters of its own, such as a whole model, has
        nothing left to initialise.
        """
        return False

    def initial_state(self, batch_size: int) -> Any:
        """Return the state before the first token."""
        return replace(self._blank_state(batch_size), origin=Origin.of(self))

    def _blank_state(self, batch_size: int) -> Any:
        """Return the state before the first token, of no origin yet."""
        raise NotImplementedError

    def _stream(
        self, inputs: Tensor, mask: np.ndarray | None, state: Any, wanted: np.ndarray | None, carry_on: bool
    ) -> tuple[Tensor, Any]:
        """Read an input; returns the logits of the wanted columns [B, kept, V] and the new state."""
        raise NotImplementedError

    @property
    def block_length(self) -> int:
        """Tokens per row that `memorize` reads at once; it ends where these end, counted from a row's first token."""
        return self.call_length

    @property
    def call_length(self) -> int:
        """Tokens per row that are read at once where no gradient is wanted, however long a text is."""
        return cast(int, self.config.segment_length)

    @property
    def has_bounded_state(self) -> bool:
        """Whether what is carried from call to call stops growing with the text."""
        return not self.segmented.sees_everything

    @property
    def blocks(self) -> list[Block]:
        """The decoder's blocks."""
        return self.segmented.blocks

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's token embedding."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embedding."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's language-model head."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's language-model head."""
        self.base.set_output_embeddings(value)

    def get_decoder(self) -> PreTrainedModel:
        """Return the decoder under the memory."""
        return self.base.get_decoder()

    def _embedding_weight(self) -> Tensor:
        return cast(Tensor, self.get_input_embeddings().weight)

    def set_attn_implementation(self, attn_implementation: str | dict[Any, Any], *args: Any, **kwargs: Any) -> None:
        """Choose the attention implementation of the decoder (the memory has only one)."""
        self.base.set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config._attn_implementation_internal = self.base.config._attn_implementation

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.gradient_checkpointing

    def compile_for_training(self, **options: Any) -> None:
        """Compile the feed-forward of every block with `torch.compile`; what is around it changes from call to call.

        Args:
            **options: of `torch.compile`.
        """
        for block in self.blocks:
            for name, child in block.module.named_children():
                if child is not block.attention and "norm" not in name and any(True for _ in child.parameters()):
                    child.compile(**options)

    def _enable_checkpointing(self, gradient_checkpointing_kwargs: Any) -> None:
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError("use_reentrant=True cannot carry a memory state; leave it out")
        self.gradient_checkpointing = True

    def _read_call(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        read: Reader,
    ) -> tuple[Tensor, MemoryCache | None]:
        """Check one call's inputs, read them, and return the logits and the cache with the new state.

        Raises:
            ShapeError: for inputs of the wrong shape or dtype, or ids outside the vocabulary.
            StateError: for a cache that is not this model's or of another batch size.
        """
        inputs = self._check_inputs(input_ids, inputs_embeds)
        batch_size, width = inputs.shape[:2]
        cache = self._check_cache(past_key_values, batch_size)
        state = self.initial_state(batch_size) if cache is None or cache.state is None else cache.state
        if state.pending:
            state = self._settled(state, inputs.device, read)
        mask = host_mask(attention_mask, batch_size, width)
        if use_cache is None:
            use_cache = not self.training
        carry_on = use_cache or cache is not None
        logits, state = read(inputs, mask, state, _wanted_columns(logits_to_keep, width), carry_on)
        if carry_on:
            cache = MemoryCache() if cache is None else cache
            cache.memory.state, cache.memory.columns = state, cache.memory.columns + width
        return logits, cache

    @torch.no_grad()
    def read_pending(self, state: MemoryState) -> MemoryState:
        """Return a state after the tokens that wait in it, as `forward` and `generate` go on from it.

        Raises:
            StateError: if it is of another model.
        """
        state = self.adopt(state, state.batch_size, weights=False)
        device = self._embedding_weight().device
        return self._settled(state, device, self._stream) if state.pending else state

    def _settled(self, state: Any, device: torch.device, read: Reader) -> Any:
        """Read the tokens that wait in a state, so that it can be gone on from at once."""
        ids, mask = as_batch([np.array(row, dtype=np.int64) for row in state.pending])
        waiting = torch.from_numpy(ids).to(device)
        return read(waiting, mask, replace(state, pending=()), np.arange(0), True)[1]

    @torch.no_grad()
    def memorize(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, state: MemoryState | None = None
    ) -> MemoryState:
        """Read tokens for the sake of the memory alone: no logits, no gradients, no dropout.

        Tokens are read in whole blocks (`block_length` per row, counted from the row's first token); what is left over
        waits in the state, and is read by the next call of `memorize`, `forward` or `generate`. So any cut of the same
        tokens into calls gives the same state bit for bit (on one machine with one number of threads; where rows of a
        batch differ in length, up to rounding).

        Args:
            input_ids: token ids, [B, T], any T >= 1, on any device.
            attention_mask: 1 for real tokens, 0 for padding anywhere, [B, T].
            state: memory to go on from; it is not changed. None = a fresh one.
        Returns:
            The memory after these tokens.
        Raises:
            ShapeError: for inputs of the wrong shape or dtype, ids outside the vocabulary, or more tokens than the
                decoder has positions for.
            StateError: if `state` is of another model, of other weights or of another batch size.
        """
        ids = self._check_inputs(input_ids.cpu(), None)
        mask = host_mask(attention_mask, *ids.shape)
        state = self.initial_state(len(ids)) if state is None else self.adopt(state, len(ids), weights=True)
        backlog = Backlog(ids.numpy(), mask, state.counts, state.pending)
        self._check_length(state.counts, backlog)
        state = replace(state, pending=()).contiguous()
        device, nothing = self._embedding_weight().device, np.arange(0)
        with evaluating(self):
            for block, real in backlog.blocks(self.block_length):
                state = self._stream(torch.from_numpy(block).to(device), real, state, nothing, True)[1].contiguous()
        return replace(state, pending=backlog.left_over())

    def adopt(self, state: Any, batch_size: int, weights: bool) -> Any:
        """Return a state that this model may go on from, bound to it.

        Raises:
            StateError: if it is of another batch size, of another model or (if asked) of other weights.
        """
        if not isinstance(state, MemoryState):
            raise StateError(f"expected a MemoryState, got {type(state).__name__}; take one from memorize or forward")
        if state.batch_size != batch_size:
            raise StateError(f"the memory holds {state.batch_size} rows, the input has {batch_size}")
        self._check_state(state)
        origin = check_origin(state.origin, self, weights)
        return state if origin is state.origin else replace(state, origin=origin)

    @property
    def longest_text(self) -> int | None:
        """Most tokens a memory can be of, where the decoder's attention sees all of them; None = any number."""
        return self.segmented.longest_text

    def _check_length(self, counts: tuple[int, ...], backlog: Backlog) -> None:
        """Refuse a text that full attention was not made for.

        Raises:
            ShapeError: naming both numbers and what to do.
        """
        longest = int((np.asarray(counts) + backlog.lengths).max())
        limit = self.longest_text
        if limit is not None and longest > limit:
            raise ShapeError(
                f"{longest:,} tokens are more than the {limit:,} positions of {self.base.config.model_type}, and its "
                "attention sees all of them; shorten the text, or use a model with an attention_span or sliding windows"
            )

    def generate(
        self, inputs: Tensor | None = None, *args: Any, memory: MemoryState | None = None, **kwargs: Any
    ) -> Any:
        """Generate as every Hugging Face model does, optionally continuing from a memory.

        Args:
            inputs: prompt ids [B, T], left-padded where rows differ in length.
            memory: state to continue from, with as many rows as the prompt; it is not changed. None = a fresh one.
            **kwargs: as in Hugging Face, and what the model's `forward` takes (such as LM2's `knock_out_memory`).
        Raises:
            ShapeError: for an empty or fully padded prompt, padding on the right, or ids outside the vocabulary.
            StateError: if `memory` has another batch size than the prompt, or other weights made it.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            _check_prompt(prompt, kwargs.get("attention_mask"))
        if kwargs.get("cache_implementation") is not None:
            raise ConfigError(
                f"cache_implementation={kwargs['cache_implementation']!r} is not for a model with a memory, which "
                "keeps its own cache; leave it out"
            )
        given = kwargs.get("past_key_values")
        if kwargs.get("use_cache", True) and given is None:
            kwargs["past_key_values"] = cache = MemoryCache()
            if memory is not None:
                rows = memory.batch_size if prompt is None else len(prompt)
                cache.memory.state = self.adopt(memory, rows, weights=True)
                if (copies := self._rows_per_prompt(kwargs)) > 1:
                    cache.batch_repeat_interleave(copies)
        elif memory is not None:
            raise StateError("memory= cannot be combined with use_cache=False or past_key_values=; choose one")
        elif isinstance(given, MemoryCache) and given.state is not None:
            given.memory.state = self.adopt(given.state, given.state.batch_size, weights=True)
        return cast(Any, super()).generate(inputs, *args, **kwargs)

    def _rows_per_prompt(self, options: dict[str, Any]) -> int:
        """Return how many rows the library makes of every row of a prompt: beams, or several answers."""
        chosen = options.get("generation_config") or self.generation_config
        wanted = (options.get(name) or getattr(chosen, name) for name in ("num_beams", "num_return_sequences"))
        return max(1, *(number or 1 for number in wanted))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare one decoding step; after the prompt every token is real, so no mask is read from the device."""
        model_inputs: dict[str, Any] = cast(Any, super()).prepare_inputs_for_generation(*args, **kwargs)
        cache = model_inputs.get("past_key_values")
        if isinstance(cache, MemoryCache) and cache.memory.columns > 0 and not kwargs.get("is_first_iteration"):
            model_inputs.pop("attention_mask", None)
        return model_inputs

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("pass exactly one of input_ids and inputs_embeds")
        inputs = input_ids if input_ids is not None else inputs_embeds
        assert inputs is not None
        if inputs.ndim != (2 if input_ids is not None else 3) or 0 in inputs.shape:
            shape = "[batch, tokens >= 1]" if input_ids is not None else "[batch, tokens >= 1, hidden_size]"
            raise ShapeError(f"expected inputs of shape {shape}, got {list(inputs.shape)}")
        if input_ids is not None:
            if input_ids.dtype not in (torch.int64, torch.int32):
                raise ShapeError(f"input_ids must be integers (int64 or int32), got {input_ids.dtype}")
            # Reading ids back from a device stalls it, so single decoding steps there go unchecked.
            if input_ids.device.type == "cpu" or input_ids.shape[1] > 1:
                self._check_vocabulary(input_ids)
        return inputs

    def _check_vocabulary(self, input_ids: Tensor) -> None:
        low, high = (int(bound) for bound in torch.aminmax(input_ids))
        size = self.config.vocab_size
        if low < 0 or high >= size:
            raise ShapeError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {size} (ids 0 to {size - 1}); "
                "was the text encoded with this model's tokenizer?"
            )

    def _cache_with(self, memory: Any, cache: Any, others: Mapping[str, Any]) -> Any:
        """Return what a call goes on from: the cache it was given, or one around the memory it was given.

        Args:
            memory: what was handed in as a memory; checked later, with the input.
            cache: what was handed in as a cache.
            others: arguments that the call knows nothing about; a memory among them would be ignored in silence.
        Raises:
            StateError: for both at once, or a memory under another name.
        """
        for name, value in others.items():
            if isinstance(value, MemoryState):
                raise StateError(f"a memory is handed to the model as memory=, not as {name}=")
        if memory is None:
            return cache
        if cache is not None:
            raise StateError("memory= cannot be combined with past_key_values=; choose one")
        return MemoryCache(memory)

    def _check_cache(self, cache: Any, batch_size: int) -> MemoryCache | None:
        if cache is None:
            return None
        if not isinstance(cache, MemoryCache):
            kind = type(cache).__name__
            raise StateError(f"past_key_values must be a MemoryCache, got {kind}; leave it out to start")
        if cache.state is not None:
            cache.memory.state = self.adopt(cache.state, batch_size, weights=False)
        return cache

    def _check_state(self, state: Any) -> None:
        """Refuse a state of another model.

        Raises:
            StateError: naming what differs.
        """
        raise NotImplementedError

    @property
    def _recomputes(self) -> bool:
        """Whether the forward pass that runs now is recomputed in the backward pass."""
        return bool(self.gradient_checkpointing and self.training and torch.is_grad_enabled())

    @property
    def _segments_at_once(self) -> int:
        """Segments that one call of the decoder may take."""
        # Gradients are cut between segments, so between calls.
        cuts = self.config.bptt_segments and torch.is_grad_enabled()
        return 1 if cuts else self.call_length // self.config.segment_length

    def _run_segments(
        self,
        runner: SegmentRunner,
        inputs: Tensor,
        mask: np.ndarray | None,
        state: Any,
        wanted: np.ndarray | None,
        carry_on: bool,
    ) -> tuple[Tensor, Any]:
        """Run all segments of an input; returns the logits of the wanted columns [B, kept, V] and the new state.

        Only what is wanted is kept of a segment, so without gradients the memory needed does not grow with the input.
        Where nobody carries on from the state (`carry_on` is False), the last segment writes nothing. Gradients flow
        through the last `bptt_segments` segments, and through as many in every earlier stretch of the input.
        """
        batch_size, width = inputs.shape[:2]
        length, depth = self.config.segment_length, self.config.bptt_segments
        at_once = self._segments_at_once
        total = count_calls(mask, width, state.counts, length, at_once)
        if total == 0:  # every token is masked: nothing happens
            return self._no_logits(inputs, wanted), state
        self.segmented.prepare()
        run: Any = partial(checkpoint, runner.run, use_reentrant=False) if self._recomputes else runner.run
        collector = ColumnCollector(batch_size, width, wanted)
        for number, call in enumerate(plan_calls(mask, width, state.counts, length, at_once)):
            if depth and number and (total - number) % depth == 0:
                state = state.detach()
            writes = carry_on or number + 1 < total
            framed = runner.frame(call, writes)
            slots = collector.slots(framed)
            logits, state = run(gather_columns(inputs, call), framed, state, slots, writes)
            collector.add(logits, framed, slots)
        return collector.result(), state

    def _no_logits(self, inputs: Tensor, wanted: np.ndarray | None) -> Tensor:
        """Return the logits of an input of which every token is masked; they mean nothing."""
        batch_size, width = inputs.shape[:2]
        kept = width if wanted is None else len(wanted)
        return self._embedding_weight().new_zeros(batch_size, kept, self.config.vocab_size)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a base without trainable parameters stays in evaluation mode, so without dropout."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.base.parameters()):
            self.base.eval()
        return self


def initialise(memory: MemoryBank | MemoryLayer | AssociativeMemory) -> None:
    """Give the parameters of a memory that were not loaded their initial values; draw nothing if all were."""
    if all(getattr(parameter, "_is_hf_initialized", False) for parameter in memory.parameters()):
        return
    for parameter, value in memory.initial_values():
        init.copy_(parameter, value)


def fresh_output_scale(config: LM2Config | MoMConfig) -> float:
    """Return what a fresh memory's output projections are multiplied by: `initial_output`, None = `initializer_range`.

    What a memory answers is then about as large as an embedding, and does not drown the token.
    """
    if config.initial_output is not None:
        return float(config.initial_output)
    decoder = config.base_config
    while isinstance(decoder, CompositeConfig):  # a bank beside the memories of a MoM model
        decoder = decoder.base_config
    return float(getattr(decoder, "initializer_range", None) or _INITIALIZER_RANGE)


def new_base(config: CompositeConfig) -> PreTrainedModel:
    """Build the decoder of a configuration, with new weights.

    Raises:
        ConfigError: for a kind of model the library has no causal language model for.
    """
    try:
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config.base_config)
    except ValueError as error:
        raise ConfigError(f"base_config: {str(error).splitlines()[0]}") from error
    return base


def _wanted_columns(logits_to_keep: int | Tensor, width: int) -> np.ndarray | None:
    """Return the columns whose logits are wanted; None = all."""
    if isinstance(logits_to_keep, Tensor):
        return np.arange(width)[logits_to_keep.cpu().numpy()]
    return None if logits_to_keep in (0, width) else np.arange(width)[-logits_to_keep:]


def _check_prompt(prompt: Tensor, attention_mask: Tensor | None) -> None:
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ShapeError(f"the prompt must hold at least one token per row, got shape {list(prompt.shape)}")
    if attention_mask is not None and attention_mask.ndim == 2:
        empty = (attention_mask.sum(dim=1) == 0).nonzero()
        if len(empty):
            raise ShapeError(f"row {int(empty[0])} of the prompt is fully padded; give every row at least one token")
        if not bool(attention_mask[:, -1].all()):
            raise ShapeError("the prompt is padded on the right; set tokenizer.padding_side = 'left' to generate")
