"""LM2: a Hugging Face decoder with a gated memory bank beside its attention.

The decoder is called once per segment, or for several where no block reads what a later one wrote, with hooks that add
the memory term (`mnemon.models.graft`); everything carried from call to call is an `LM2State`. The mathematics is in
`mnemon.layers.memory_bank` and `docs/lm2.md`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from mnemon.errors import ConfigError, StateError
from mnemon.layers.memory_bank import BankProjection, MemoryBank, initial_bank, state_dtype
from mnemon.layers.memory_diagnostics import MemoryDiagnostics
from mnemon.layers.routing import RoutingStatistics, load
from mnemon.models.adapter import load_adapter, save_adapter
from mnemon.models.base_model import BaseReference, as_base, describe, freeze
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.graft import memory_blocks
from mnemon.models.memory_model import MemoryModel, fresh_output_scale, initialise, new_base
from mnemon.models.memory_segments import MemorySegments
from mnemon.models.modeling_mom import MoMForCausalLM
from mnemon.models.segmented_decoder import SegmentedDecoder, joined_statistics
from mnemon.models.state import LM2State, MemoryCache, MemoryState

_DEFAULT_SINKS = 4
_CALL_LENGTH = 512  # tokens per row that one call takes through a block, where it may take several segments


@dataclass
class LM2Output(CausalLMOutputWithPast):
    """Hugging Face's output, and what the memory did.

    Attributes:
        diagnostics: means by name, scalars (see `MemoryDiagnostics`), if they were asked for.
        balance_loss: how unevenly the memories of a MoM base were used, before its weight (see `MoMOutput`).
        loads: share of the choices that fell on each of these memories, [layers with a router, E].
        write_rate: mean rate of writing over rows, updates and slots, before its weight (see `LM2Config.write_cost`).
    """

    diagnostics: dict[str, Tensor] | None = None
    balance_loss: Tensor | None = None
    loads: Tensor | None = None
    write_rate: Tensor | None = None


class LM2ForCausalLM(MemoryModel):
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

    config: LM2Config
    initial_memory: Tensor
    base_reference: BaseReference | None = None  # known once the base is frozen

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryBank):
            initialise(module)
        elif isinstance(module, LM2ForCausalLM):
            init.copy_(module.initial_memory, initial_bank(self.config.num_slots, _slot_dim(self.config)))
        elif not isinstance(module, BankProjection):
            super()._init_weights(module)

    def __init__(self, config: LM2Config, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.base = new_base(config) if base is None else base
        # Under a MoM model lies a decoder whose blocks have been altered; the bank goes beside what stands there now.
        mixture = self.base if isinstance(self.base, MoMForCausalLM) else None
        self.segmented = SegmentedDecoder(
            self.base if mixture is None else mixture.base,
            config.segment_length,
            config.attention_span,
            config.attention_sinks,
            config.blocks_path,
            config.attention_name,
            None if mixture is None else mixture.graft,
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
                    skip_gate=config.skip_gate,
                    coupled_gates=config.coupled_gates,
                    write_query=config.write_query,
                    write_conv=config.write_conv,
                    read_top_k=config.read_top_k,
                    initial_output=fresh_output_scale(config),
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
        model.segmented.verify(base)
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

    @property
    def balance_weight(self) -> float:
        """What the balance loss of a MoM base is multiplied by before it joins the loss; 0 for any other base."""
        return self.base.balance_weight if isinstance(self.base, MoMForCausalLM) else 0.0

    @property
    def write_cost(self) -> float:
        """What the mean rate of writing is multiplied by before it joins the loss."""
        return self.config.write_cost

    @property
    def banks(self) -> list[MemoryBank]:
        """The memory banks in block order."""
        banks = [bank for bank in self.memory.values() if isinstance(bank, MemoryBank)]
        if len(banks) < len(self.memory):  # going on would mean running without memory
            raise ConfigError("PEFT has wrapped the memory; leave it out of modules_to_save and train it as it is")
        return banks

    @property
    def call_length(self) -> int:
        """Tokens per row that are read at once, however long a text is.

        One segment, unless every bank belongs to one block: then nothing that a block reads comes from a later one, and
        several segments go through the blocks together.
        """
        length: int = self.config.segment_length
        own_banks = self.config.flow == "layer" or len(self.memory) <= 1
        # The keys of sinks move from segment to segment.
        together = own_banks and not any(reach.sinks for reach in self.segmented.reaches)
        return length * max(1, _CALL_LENGTH // length) if together else length

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute each call of the decoder in the backward pass instead of keeping its activations.

        The whole call, a pure function of (tokens, state), is checkpointed; the decoder's own per-block switch stays
        off, because it drops the cache that carries the state. `gradient_checkpointing_kwargs` are accepted as Hugging
        Face passes them; only `use_reentrant=False` exists.
        """
        self._enable_checkpointing(gradient_checkpointing_kwargs)

    def _blank_state(self, batch_size: int) -> LM2State:
        """Return the state before the first token."""
        config = self.config
        like = self.banks[0].output.weight if self.banks else self._embedding_weight()
        layers = 1 if config.flow == "depth" else len(self.banks)
        bank = self.initial_memory.to(dtype=state_dtype(like.dtype), device=like.device)
        bank = bank.expand(batch_size, layers, -1, -1)
        return LM2State(
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
        memory: MemoryState | None = None,
        knock_out_memory: bool = False,
        output_diagnostics: bool = False,
        output_routing: bool = False,
        output_write_rate: bool = False,
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
            memory: state to go on from, with as many rows as the input; it is not changed, the new one is in the cache
                that is returned. None = a fresh one, or that of `past_key_values`.
            knock_out_memory: run without the memory (no read, no write): the knocked-out control.
            output_diagnostics: whether to return what the memory did (see `MemoryDiagnostics`).
            output_routing: whether to return how the routers of a MoM base chose.
            output_write_rate: whether to return how much slots take part in updates; needs `skip_gate`.
        Returns:
            Logits [B, columns kept, vocabulary], loss, cache, diagnostics, balance loss, loads and rate of writing.
        Raises:
            ShapeError: for inputs of the wrong shape or dtype, or ids outside the vocabulary.
            StateError: for a cache or memory that is not this model's or of another batch size, or for both at once.
            ConfigError: for a rate of writing of a model without skip gates.
        """
        collector = MemoryDiagnostics() if output_diagnostics else None
        mixture = self.base if isinstance(self.base, MoMForCausalLM) else None
        balances = labels is not None and self.training and self.balance_weight > 0
        choices: list[RoutingStatistics] | None = [] if mixture is not None and (balances or output_routing) else None
        if output_write_rate and not self.config.skip_gate:
            raise ConfigError("output_write_rate needs skip_gate=True: without skip gates there is no rate of writing")
        costs = labels is not None and self.training and self.write_cost > 0
        rates: list[Tensor] | None = [] if costs or output_write_rate else None
        read = partial(self._stream, knock_out=knock_out_memory, diagnostics=collector, choices=choices, rates=rates)
        past_key_values = self._cache_with(memory, past_key_values, kwargs)
        logits, cache = self._read_call(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, logits_to_keep, read
        )
        balance = mixture.balance(choices) if mixture is not None and choices else None
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if balances and balance is not None:
                loss = loss + self.balance_weight * balance.to(loss.dtype)
            if costs and rates:
                loss = loss + self.write_cost * rates[0].to(loss.dtype)
        loads = torch.stack([load(statistics) for statistics in choices]) if choices else None
        means = collector.means() if output_diagnostics and collector is not None else None
        return LM2Output(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            diagnostics=means,
            balance_loss=balance,
            loads=loads,
            write_rate=rates[0] if rates else None,
        )

    @contextmanager
    def collect_diagnostics(self) -> Iterator[MemoryDiagnostics]:
        """Collect what the memory does in all forward passes within the context, those of `generate` included."""
        self._collector = MemoryDiagnostics()
        try:
            yield self._collector
        finally:
            self._collector = None

    def _check_state(self, state: LM2State) -> None:
        layers = 1 if self.config.flow == "depth" else len(self.banks)
        bank = (layers, *self.initial_memory.shape)
        blocks, found = self.config.num_hidden_layers, len(state.decoder.base)
        if not isinstance(state, LM2State) or state.bank.shape[1:] != bank or found != blocks:
            held = f"bank {list(state.bank.shape[1:])}" if isinstance(state, LM2State) else "no bank"
            raise StateError(
                f"the memory is of another model: {held}, {found} blocks; this one has bank {list(bank)}, {blocks} "
                "blocks"
            )
        self.segmented.check_state(state.decoder)

    def _stream(
        self,
        inputs: Tensor,
        mask: np.ndarray | None,
        state: LM2State,
        wanted: np.ndarray | None,
        carry_on: bool,
        knock_out: bool = False,
        diagnostics: MemoryDiagnostics | None = None,
        choices: list[RoutingStatistics] | None = None,
        rates: list[Tensor] | None = None,
    ) -> tuple[Tensor, LM2State]:
        """Read an input; returns the logits of the wanted columns [B, kept, V] and the new state.

        How the routers of a base with mixtures of memories chose is put into `choices`, the mean rate of writing into
        `rates`.
        """
        width = inputs.shape[1]
        real = width if mask is None else mask.sum(axis=1)
        self.segmented.check_positions(np.asarray(state.counts) + real)
        call_per_segment = self._segments_at_once == 1
        segments = MemorySegments(
            self.segmented,
            {} if knock_out else {int(index): bank for index, bank in zip(self.memory, self.banks, strict=True)},
            self.config.flow,
            # A call over several segments joins its keys with few earlier ones, if attention sees no more.
            keep_pieces=self.training
            and torch.is_grad_enabled()
            and (self.segmented.sees_everything or call_per_segment),
            recomputes=self._recomputes,
            joins=call_per_segment,
            diagnostics=self._collector if diagnostics is None else diagnostics,
            initial=self.initial_memory,
        )
        if choices is not None:
            state = replace(state, decoder=replace(state.decoder, routing=()))
        if rates is not None:
            none_yet = state.bank.new_zeros(state.batch_size)
            state = replace(state, write_rates=(none_yet, none_yet))
        logits, state = self._run_segments(segments, inputs, mask, state, wanted, carry_on)
        if choices is not None:
            choices[:] = joined_statistics(tuple(choices), state.decoder.routing or ())
            state = replace(state, decoder=replace(state.decoder, routing=None))
        if rates is not None:
            assert state.write_rates is not None
            sums, updates = state.write_rates
            rates[:] = [sums.sum() / updates.sum().clamp_min(1)]
            state = replace(state, write_rates=None)
        return logits, state


def _slot_dim(config: LM2Config) -> int:
    """Return the slot width, which the configuration has resolved to a number."""
    return cast(int, config.slot_dim)
