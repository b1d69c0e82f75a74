"""LM2: a Hugging Face decoder with a gated memory bank beside its attention.

The decoder is called once per segment with hooks that add the memory term (`mnemon.models.graft`); everything carried
from segment to segment is a `MemoryState`. The mathematics is in `mnemon.layers.memory_bank` and `docs/lm2.md`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from mnemon.errors import ConfigError, ShapeError, StateError
from mnemon.layers.memory_bank import (
    BankProjection,
    MemoryBank,
    SegmentRead,
    WriteStatistics,
    initial_bank,
    state_dtype,
)
from mnemon.models.adapter import load_adapter, save_adapter
from mnemon.models.base_cache import BaseCache
from mnemon.models.base_model import BaseReference, as_base, describe, freeze
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.graft import Block, attached, find_blocks, memory_blocks
from mnemon.models.masks import as_attention_mask, call_key_positions, visibility
from mnemon.models.segments import SegmentCall, gather_columns, host_mask, plan_calls, scatter_columns
from mnemon.models.state import MemoryCache, MemoryState


class LM2PreTrainedModel(PreTrainedModel):
    """What Hugging Face needs to know about LM2: configuration class, initialisation, what is not supported."""

    config: LM2Config
    base_model_prefix = "base"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # a memory cannot be rolled back, so assisted generation is refused by the library
    _skip_keys_device_placement = {"past_key_values"}  # noqa: RUF012 (the library declares it per instance)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryBank):
            for parameter, value in module.initial_values():
                init.copy_(parameter, value)
        elif isinstance(module, LM2ForCausalLM):
            init.copy_(module.initial_memory, initial_bank(self.config.num_slots, _slot_dim(self.config)))
        elif not isinstance(module, BankProjection):
            super()._init_weights(module)


class LM2ForCausalLM(LM2PreTrainedModel, GenerationMixin):
    """A causal language model with an LM2 memory.

    The decoder lives unchanged under `base.`, one `MemoryBank` per chosen block under `memory.`. `forward` takes
    inputs of any length; it cuts them into segments of `config.segment_length` real tokens per row. `position_ids` are
    accepted for compatibility and not used: positions count real tokens per row, whatever the padding.

    Args:
        config: the model's configuration.
    Raises:
        ConfigError: if the decoder is of a kind a memory cannot be grafted on.
    Source:
        LM2: Large Memory Models, arXiv:2502.06049.
    """

    initial_memory: Tensor
    base_reference: BaseReference | None = None  # known once the base is frozen

    def __init__(self, config: LM2Config, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.base_config) if base is None else base
        indices = memory_blocks(find_blocks(self.base), config.memory_layers)
        # One pass over all blocks keeps `retention` of a bank; in flow `depth` the pass is as many updates as blocks.
        updates = len(indices) if config.flow == "depth" else 1
        kept_per_update = config.retention ** (1 / max(updates, 1))
        self.memory = nn.ModuleDict(
            {
                str(index): MemoryBank(
                    config.hidden_size,
                    config.num_slots,
                    _slot_dim(config),
                    config.num_memory_heads,
                    forget_bias=float(np.log(kept_per_update / (1 - kept_per_update))),
                    read_top_k=config.read_top_k,
                )
                for index in indices
            }
        )
        self.register_buffer("initial_memory", initial_bank(config.num_slots, _slot_dim(config)), persistent=False)
        self.post_init()

    @classmethod
    def from_base(cls, model_or_name: PreTrainedModel | str | Path, freeze_base: bool = False, **options: Any) -> Self:
        """Graft a fresh memory on a pretrained decoder without changing a logit within the first segment.

        The memory's output projection starts at zero, so the model with a fresh memory equals the model without.

        Args:
            model_or_name: a loaded causal language model (used as it is, not copied), with or without PEFT layers, or
                a folder, shipped checkpoint or hub name.
            freeze_base: train the memory alone: the base's own weights no longer require gradients, and are
                fingerprinted (one pass over them), so that `save_adapter` can say what the memory belongs to.
            **options: fields of `LM2Config`.
        Raises:
            ConfigError: if the decoder cannot be grafted on, or an option is wrong.
            CheckpointError: if there is no such model, or its files are damaged.
        """
        base = as_base(model_or_name)
        config = LM2Config(base_config=base.config, dtype=base.dtype, **options)
        training = base.training
        model = cls(config, base)  # a decoder that has its weights keeps them
        with torch.no_grad():
            for bank in model.banks:
                bank.output.weight.zero_()
        model.memory.to(device=base.device, dtype=base.dtype)
        model.initial_memory = model.initial_memory.to(base.device)
        if freeze_base:
            freeze(base)
            model.base_reference = describe(base)
        return model.train(training)

    @classmethod
    def from_adapter(cls, folder: str | Path, base: PreTrainedModel | str | Path | None = None) -> Self:
        """Put a memory saved by `save_adapter` on its base (see `mnemon.models.adapter.load_adapter`)."""
        return load_adapter(cls, folder, base)

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the memory alone, without the base (see `mnemon.models.adapter.save_adapter`)."""
        return save_adapter(self, folder)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a base without trainable parameters stays in evaluation mode, so without dropout."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.base.parameters()):
            self.base.eval()
        return self

    @property
    def banks(self) -> list[MemoryBank]:
        """The memory banks in block order."""
        banks = [bank for bank in self.memory.values() if isinstance(bank, MemoryBank)]
        if len(banks) < len(self.memory):  # going on would mean running without memory
            raise ConfigError("PEFT has wrapped the memory; leave it out of modules_to_save and train it as it is")
        return banks

    @property
    def blocks(self) -> list[Block]:
        """The decoder's blocks."""
        return find_blocks(self.base)

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

    def initial_state(self, batch_size: int) -> MemoryState:
        """Return the state before the first token."""
        config = self.config
        like = self.banks[0].output.weight if self.banks else self._embedding_weight()
        layers = 1 if config.flow == "depth" else len(self.banks)
        bank = self.initial_memory.to(dtype=state_dtype(like.dtype), device=like.device)
        bank = bank.expand(batch_size, layers, -1, -1)
        return MemoryState(
            counts=(0,) * batch_size,
            bank=bank,
            kept=torch.ones_like(bank),
            statistics=tuple(memory.empty_statistics(batch_size, like) for memory in self.banks),
            base=((),) * config.num_hidden_layers,
            key_positions=np.zeros((batch_size, 0), dtype=np.int64),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        knock_out_memory: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute next-token logits, and the loss if labels are given.

        Args:
            input_ids: token ids, [B, T], any T >= 1.
            attention_mask: 1 for real tokens, 0 for padding anywhere; [B, T], or longer when earlier columns are
                included (its last T columns count). Logits at masked positions are undefined.
            past_key_values: cache of earlier calls; it is given the new state.
            inputs_embeds: embeddings instead of ids, [B, T, D].
            labels: ids to predict, shifted inside, -100 = ignored, [B, T].
            use_cache: whether to return a cache; default: not while training.
            logits_to_keep: number of last columns to compute logits for (0 = all), or their indices.
            knock_out_memory: run without the memory (no read, no write): the knocked-out control.
        Returns:
            Logits [B, columns kept, vocabulary], loss, cache.
        Raises:
            ShapeError: for inputs of the wrong shape or dtype, or ids outside the vocabulary.
            StateError: for a cache that is not this model's or of another batch size.
        """
        inputs = self._check_inputs(input_ids, inputs_embeds)
        batch_size, width = inputs.shape[:2]
        cache = self._check_cache(past_key_values, batch_size)
        state = self.initial_state(batch_size) if cache is None or cache.state is None else cache.state
        mask = host_mask(attention_mask, batch_size, width)
        hidden, state = self._stream(inputs, mask, state, knock_out_memory)
        if use_cache is None:
            use_cache = not self.training
        if use_cache or cache is not None:
            cache = MemoryCache() if cache is None else cache
            cache.memory.state, cache.memory.columns = state, cache.memory.columns + width
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self._logits(hidden if isinstance(keep, int) else hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def generate(
        self, inputs: Tensor | None = None, *args: Any, memory: MemoryState | None = None, **kwargs: Any
    ) -> Any:
        """Generate as every Hugging Face model does, optionally continuing from a memory.

        Args:
            inputs: prompt ids [B, T], left-padded where rows differ in length.
            memory: state to continue from; it is not changed. None = a fresh one.
            knock_out_memory: run without the memory.
        Raises:
            ShapeError: for an empty or fully padded prompt, padding on the right, or ids outside the vocabulary.
            StateError: if `memory` has another batch size than the prompt.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            _check_prompt(prompt, kwargs.get("attention_mask"))
        if kwargs.get("cache_implementation") is not None:
            raise ConfigError(
                f"cache_implementation={kwargs['cache_implementation']!r} is not for LM2, which keeps its own "
                "memory cache; leave it out"
            )
        if kwargs.get("use_cache", True) and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = MemoryCache(None if memory is None else memory.branch())
        elif memory is not None:
            raise StateError("memory= cannot be combined with use_cache=False or past_key_values=; choose one")
        return cast(Any, super()).generate(inputs, *args, **kwargs)

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

    def _check_cache(self, cache: Any, batch_size: int) -> MemoryCache | None:
        if cache is None:
            return None
        if not isinstance(cache, MemoryCache):
            kind = type(cache).__name__
            raise StateError(f"past_key_values must be a MemoryCache, got {kind}; leave it out to start")
        state = cache.state
        if state is not None:
            if state.batch_size != batch_size:
                raise StateError(f"the memory holds {state.batch_size} rows, the input has {batch_size}")
            layers = 1 if self.config.flow == "depth" else len(self.banks)
            bank = (layers, *self.initial_memory.shape)
            blocks = self.config.num_hidden_layers
            if state.bank.shape[1:] != bank or len(state.base) != blocks:
                raise StateError(
                    f"the memory is of another model: bank {list(state.bank.shape[1:])}, {len(state.base)} blocks; "
                    f"this one has bank {list(bank)}, {blocks} blocks"
                )
        return cache

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.get_output_embeddings()(hidden)
        cap = getattr(self.config.base_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _stream(
        self, inputs: Tensor, mask: np.ndarray | None, state: MemoryState, knock_out: bool
    ) -> tuple[Tensor, MemoryState]:
        """Run all segments of an input; returns final hidden states [B, T, D] and the new state."""
        width = inputs.shape[1]
        calls = plan_calls(mask, width, state.counts, self.config.segment_length)
        if not calls:  # every token is masked: nothing happens, and the logits are undefined
            embedded = self.get_input_embeddings()(inputs) if inputs.ndim == 2 else inputs
            return torch.zeros_like(embedded), state
        blocks = self.blocks
        pieces = []
        for number, call in enumerate(calls):
            if self.config.bptt_segments and number and (len(calls) - number) % self.config.bptt_segments == 0:
                state = state.detach()
            hidden, state = self._run_call(gather_columns(inputs, call), call, state, blocks, knock_out)
            pieces.append(hidden)
        return scatter_columns(pieces, calls, width), state

    def _run_call(
        self, inputs: Tensor, call: SegmentCall, state: MemoryState, blocks: Sequence[Block], knock_out: bool
    ) -> tuple[Tensor, MemoryState]:
        """Run one call of the decoder, within one segment of every row."""
        cache = BaseCache(state.base, [block.kind for block in blocks], call)
        keys = call_key_positions(state.key_positions, call)
        arguments = {
            "input_ids" if inputs.ndim == 2 else "inputs_embeds": inputs,
            "attention_mask": self._attention_mask(keys, call, blocks, inputs.device),
            "position_ids": _call_tensor(call.positions(), call, inputs.device),
            "past_key_values": cache,
            "use_cache": True,
        }
        banks = [] if knock_out else self.banks
        segments = [bank.open_segment(self._segment_bank(state, order)) for order, bank in enumerate(banks)]
        statistics = list(state.statistics)
        with attached(blocks, self._memory_indices() if banks else [], self._term(call, segments, statistics)):
            hidden = self.get_decoder()(**arguments).last_hidden_state
        counts = call.starts + call.lengths
        keep, columns = self._columns_to_keep(keys, counts, inputs.device)
        state = replace(
            state,
            counts=tuple(int(count) for count in counts),
            base=cache.entries(keep),
            key_positions=keys[:, columns],
            statistics=tuple(statistics),
        )
        return hidden, self._close_segments(state, call) if banks and call.completes.any() else state

    def _memory_indices(self) -> list[int]:
        return [int(index) for index in self.memory]

    def _segment_bank(self, state: MemoryState, order: int) -> Tensor:
        return state.bank[:, 0 if self.config.flow == "depth" else order]

    def _term(self, call: SegmentCall, segments: list[SegmentRead], statistics: list[WriteStatistics]) -> Any:
        """Build the memory term of every block; as a side effect it replaces the entries of `statistics`."""
        positions = call.positions() % self.config.segment_length
        valid = None if call.is_dense else np.arange(call.width)[None, :] < call.lengths[:, None]

        def term(order: int, h: Tensor, x: Tensor, attended: Tensor) -> Tensor:
            bank = self.banks[order]
            added, _ = bank.read(x, segments[order])
            statistics[order] = bank.gather(
                h + attended + added,
                _call_tensor(positions, call, h.device),
                None if valid is None else torch.from_numpy(valid).to(h.device),
                segments[order],
                statistics[order],
            )
            return added

        return term

    def _close_segments(self, state: MemoryState, call: SegmentCall) -> MemoryState:
        """Update the bank of every row whose segment is complete, block after block, and empty its statistics."""
        everywhere = bool(call.completes.all())
        complete = None if everywhere else torch.from_numpy(call.completes).to(state.bank.device)
        depth = self.config.flow == "depth"
        banks, kept = list(state.bank.unbind(1)), list(state.kept.unbind(1))
        for order, bank in enumerate(self.banks):
            index = 0 if depth else order
            updated, gates = bank.update(banks[index], state.statistics[order])
            banks[index] = _where(complete, updated, banks[index])
            kept[index] = _where(complete, kept[index] * gates.forget_gate.detach(), kept[index])
        statistics = []
        for bank, old in zip(self.banks, state.statistics, strict=True):
            empty = bank.empty_statistics(state.batch_size, bank.output.weight)
            statistics.append(WriteStatistics(*(_where(complete, e, o) for e, o in zip(empty, old, strict=True))))
        return replace(
            state, bank=torch.stack(banks, dim=1), kept=torch.stack(kept, dim=1), statistics=tuple(statistics)
        )

    def _attention_mask(
        self, keys: np.ndarray, call: SegmentCall, blocks: Sequence[Block], device: torch.device
    ) -> Any:
        """Mask for the decoder: None (its own causal mask), a 4-D tensor, or one per layer type."""
        windows = {block.window for block in blocks if block.attention is not None}
        seen = {window: visibility(keys, call, _narrower(window, self.config.attention_span)) for window in windows}
        if all(pattern is None for pattern in seen.values()):
            return None
        cached = keys.shape[1] - call.width
        causal = np.tri(call.width, keys.shape[1], cached, dtype=bool)[None]
        implementation = self.get_decoder().config._attn_implementation
        masks = {
            window: as_attention_mask(causal if pattern is None else pattern, implementation, self.dtype, device)
            for window, pattern in seen.items()
        }
        layer_types = getattr(self.config.base_config, "layer_types", None)
        if layer_types is None:
            return next(iter(masks.values()))
        by_type: dict[str, Tensor | None] = {}
        for layer_type, block in zip(layer_types, blocks, strict=True):
            by_type[layer_type] = None if block.attention is None else masks[block.window]
        return by_type

    def _columns_to_keep(
        self, keys: np.ndarray, counts: np.ndarray, device: torch.device
    ) -> tuple[slice | Tensor, slice | np.ndarray]:
        """Choose the key columns that some later token still sees: for the tensors, and for the host's positions."""
        span = self.config.attention_span
        oldest = np.zeros_like(counts) if span is None else counts - span + 1
        needed = ((keys >= 0) & (keys >= oldest[:, None])).any(axis=0)
        columns = np.flatnonzero(needed)
        if len(columns) == 0:
            return slice(keys.shape[1], None), slice(keys.shape[1], None)
        if len(columns) == keys.shape[1] - columns[0]:
            return slice(int(columns[0]), None), slice(int(columns[0]), None)
        return torch.from_numpy(columns).to(device), columns


def _slot_dim(config: LM2Config) -> int:
    """Return the slot width, which the configuration has resolved to a number."""
    return cast(int, config.slot_dim)


def _call_tensor(values: np.ndarray, call: SegmentCall, device: torch.device) -> Tensor:
    """Put per-token numbers [B, width] on the device, as one row where all rows agree."""
    return torch.from_numpy(values[:1] if call.is_uniform else values).to(device)


def _where(condition: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """Choose rows of `new` where `condition` [B] holds; None = everywhere."""
    return new if condition is None else torch.where(condition.view(-1, *[1] * (new.ndim - 1)), new, old)


def _narrower(window: int | None, span: int | None) -> int | None:
    limits = [limit for limit in (window, span) if limit is not None]
    return min(limits) if limits else None


def _check_prompt(prompt: Tensor, attention_mask: Tensor | None) -> None:
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ShapeError(f"the prompt must hold at least one token per row, got shape {list(prompt.shape)}")
    if attention_mask is not None and attention_mask.ndim == 2:
        empty = (attention_mask.sum(dim=1) == 0).nonzero()
        if len(empty):
            raise ShapeError(f"row {int(empty[0])} of the prompt is fully padded; give every row at least one token")
        if not bool(attention_mask[:, -1].all()):
            raise ShapeError("the prompt is padded on the right; set tokenizer.padding_side = 'left' to generate")
