"""LM2: a Hugging Face decoder with a gated memory bank beside its attention.

The decoder is called once per segment with hooks that add the memory term (`mnemon.models.graft`); everything carried
from segment to segment is a `MemoryState`. The mathematics is in `mnemon.layers.memory_bank` and `docs/lm2.md`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from mnemon.errors import ConfigError, ShapeError, StateError
from mnemon.layers.memory_bank import BankProjection, MemoryBank, initial_bank, state_dtype
from mnemon.layers.memory_diagnostics import MemoryDiagnostics
from mnemon.models.adapter import load_adapter, save_adapter
from mnemon.models.base_model import BaseReference, as_base, describe, freeze
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.graft import Block, memory_blocks
from mnemon.models.memory_segments import MemorySegments
from mnemon.models.segmented_decoder import SegmentedDecoder
from mnemon.models.segments import ColumnCollector, count_calls, gather_columns, host_mask, plan_calls
from mnemon.models.state import MemoryCache, MemoryState

_DEFAULT_SINKS = 4


@dataclass
class LM2Output(CausalLMOutputWithPast):
    """Hugging Face's output, and what the memory did.

    Attributes:
        diagnostics: means by name, scalars (see `MemoryDiagnostics`), if they were asked for.
    """

    diagnostics: dict[str, Tensor] | None = None


class LM2PreTrainedModel(PreTrainedModel):
    """What Hugging Face needs to know about LM2: configuration class, initialisation, what is not supported."""

    config: LM2Config
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
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
        self.base = _new_base(config) if base is None else base
        self.segmented = SegmentedDecoder(
            self.base,
            config.segment_length,
            config.attention_span,
            config.attention_sinks,
            config.blocks_path,
            config.attention_name,
        )
        self.gradient_checkpointing = False
        self._collector: MemoryDiagnostics | None = None
        indices = memory_blocks(self.blocks, config.memory_layers)
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
                    retention=kept_per_update,
                    gate_stretch=config.gate_stretch,
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
            **options: fields of `LM2Config`. With an `attention_span`, `attention_sinks` is 4 unless given: a
                pretrained decoder collapses once its first tokens are out of sight.
        Raises:
            ConfigError: if an option is wrong, or the decoder cannot be grafted on: of a kind that is not understood,
                or with other logits when it reads a text in pieces (tried on a few tokens).
            CheckpointError: if there is no such model, or its files are damaged.
        """
        base = as_base(model_or_name)
        if options.get("attention_span") is not None:
            options.setdefault("attention_sinks", _DEFAULT_SINKS)
        config = LM2Config(base_config=base.config, dtype=base.dtype, **options)
        training = base.training
        model = cls(config, base)  # a decoder that has its weights keeps them
        model.segmented.verify()
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

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute each segment in the backward pass instead of keeping its activations.

        The whole segment, a pure function of (tokens, state), is checkpointed; the decoder's own per-block switch stays
        off, because it drops the cache that carries the state. `gradient_checkpointing_kwargs` are accepted as Hugging
        Face passes them; only `use_reentrant=False` exists.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError("use_reentrant=True cannot carry a memory state; leave it out")
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether segments are recomputed in the backward pass."""
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

    def initial_state(self, batch_size: int) -> MemoryState:
        """Return the state before the first token."""
        config = self.config
        like = self.banks[0].output.weight if self.banks else self._embedding_weight()
        layers = 1 if config.flow == "depth" else len(self.banks)
        bank = self.initial_memory.to(dtype=state_dtype(like.dtype), device=like.device)
        bank = bank.expand(batch_size, layers, -1, -1)
        return MemoryState(
            decoder=self.segmented.initial_state(batch_size),
            bank=bank,
            kept=torch.ones_like(bank),
            statistics=tuple(memory.empty_statistics(batch_size, like) for memory in self.banks),
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
        output_diagnostics: bool = False,
        **kwargs: Any,
    ) -> LM2Output:
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
            output_diagnostics: whether to return what the memory did (see `MemoryDiagnostics`).
        Returns:
            Logits [B, columns kept, vocabulary], loss, cache, diagnostics.
        Raises:
            ShapeError: for inputs of the wrong shape or dtype, or ids outside the vocabulary.
            StateError: for a cache that is not this model's or of another batch size.
        """
        inputs = self._check_inputs(input_ids, inputs_embeds)
        batch_size, width = inputs.shape[:2]
        cache = self._check_cache(past_key_values, batch_size)
        state = self.initial_state(batch_size) if cache is None or cache.state is None else cache.state
        mask = host_mask(attention_mask, batch_size, width)
        wanted = _wanted_columns(logits_to_keep, width)
        if use_cache is None:
            use_cache = not self.training
        carry_on = use_cache or cache is not None
        collector = MemoryDiagnostics() if output_diagnostics else self._collector
        logits, state = self._stream(inputs, mask, state, wanted, knock_out_memory, carry_on, collector)
        if carry_on:
            cache = MemoryCache() if cache is None else cache
            cache.memory.state, cache.memory.columns = state, cache.memory.columns + width
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        means = collector.means() if output_diagnostics and collector is not None else None
        return LM2Output(loss=loss, logits=logits, past_key_values=cache, diagnostics=means)

    @contextmanager
    def collect_diagnostics(self) -> Iterator[MemoryDiagnostics]:
        """Collect what the memory does in all forward passes within the context, those of `generate` included."""
        self._collector = MemoryDiagnostics()
        try:
            yield self._collector
        finally:
            self._collector = None

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
            blocks, found = self.config.num_hidden_layers, len(state.decoder.base)
            if state.bank.shape[1:] != bank or found != blocks:
                raise StateError(
                    f"the memory is of another model: bank {list(state.bank.shape[1:])}, {found} blocks; "
                    f"this one has bank {list(bank)}, {blocks} blocks"
                )
        return cache

    def _stream(
        self,
        inputs: Tensor,
        mask: np.ndarray | None,
        state: MemoryState,
        wanted: np.ndarray | None,
        knock_out: bool,
        carry_on: bool,
        diagnostics: MemoryDiagnostics | None,
    ) -> tuple[Tensor, MemoryState]:
        """Run all segments of an input; returns the logits of the wanted columns [B, kept, V] and the new state.

        Only what is wanted is kept of a segment, so without gradients the memory needed does not grow with the input.
        Where nobody carries on from the state (`carry_on` is False), the last segment writes nothing.
        """
        batch_size, width = inputs.shape[:2]
        length = self.config.segment_length
        total = count_calls(mask, width, state.counts, length)
        kept = width if wanted is None else len(wanted)
        if total == 0:  # every token is masked: nothing happens, and the logits are undefined
            return self._embedding_weight().new_zeros(batch_size, kept, self.config.vocab_size), state
        real = width if mask is None else mask.sum(axis=1)
        self.segmented.check_positions(np.asarray(state.counts) + real)
        self.segmented.prepare()
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        segments = MemorySegments(
            self.segmented,
            {} if knock_out else {int(index): bank for index, bank in zip(self.memory, self.banks, strict=True)},
            self.config.flow,
            keep_pieces=self.training and torch.is_grad_enabled(),
            recomputes=recomputes,
            diagnostics=diagnostics,
            initial=self.initial_memory,
        )
        run: Any = partial(checkpoint, segments.run, use_reentrant=False) if recomputes else segments.run
        collector = ColumnCollector(batch_size, width, wanted)
        for number, call in enumerate(plan_calls(mask, width, state.counts, length)):
            if self.config.bptt_segments and number and (total - number) % self.config.bptt_segments == 0:
                state = state.detach()
            slots = collector.slots(call)
            writes = carry_on or number + 1 < total
            logits, state = run(gather_columns(inputs, call), call, state, slots, writes)
            collector.add(logits, call, slots)
        return collector.result(), state


def _new_base(config: LM2Config) -> PreTrainedModel:
    try:
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config.base_config)
    except ValueError as error:  # a kind of model the library has no causal language model for
        raise ConfigError(f"base_config: {str(error).splitlines()[0]}") from error
    return base


def _slot_dim(config: LM2Config) -> int:
    """Return the slot width, which the configuration has resolved to a number."""
    return cast(int, config.slot_dim)


def _stacked(layers: list[Tensor]) -> Tensor:
    return layers[0][:, None] if len(layers) == 1 else torch.stack(layers, dim=1)


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
