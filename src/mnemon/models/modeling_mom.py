"""MoM: a Hugging Face decoder with linear memories, of which a router picks a few per token, in place of attention.

The decoder is built by the library; its attention modules are replaced block by block (`MoMConfig.layer_types`), so
their weights do not exist. What a memory is, is in `mnemon.layers.mixture_of_memories` and `docs/mom.md`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mnemon.errors import ConfigError, StateError
from mnemon.layers.linear_memory import LinearMemory
from mnemon.layers.memory_layer import MemoryLayer
from mnemon.layers.mixture_of_memories import MixtureOfMemories
from mnemon.layers.routing import Balance, RoutingStatistics, balance_loss, load
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.graft import Block, Graft, find_graft, num_values_taken
from mnemon.models.memory_mixer import MemoryMixer
from mnemon.models.memory_model import MemoryModel, fresh_output_scale, initialise, new_base
from mnemon.models.parameters import active_parameters
from mnemon.models.segmented_decoder import SegmentedDecoder, joined_statistics
from mnemon.models.segments import ColumnCollector, count_calls, gather_columns, plan_calls
from mnemon.models.state import MemoryCache, MemoryState

_CALL_LENGTH = 4096  # tokens per row that are read at once where no gradient is wanted: activations stay bounded
_BLOCK_LENGTH = 512  # divides the above, so that a block is one call
_ENDLESS = 2**40


@dataclass
class MoMOutput(CausalLMOutputWithPast):
    """Hugging Face's output, and how the routers chose.

    Attributes:
        balance_loss: how unevenly the memories were used (`mnemon.layers.routing.balance_loss`), before its weight; in
            training it is part of `loss`.
        loads: share of the choices that fell on each memory, [layers with a router, E].
    """

    balance_loss: Tensor | None = None
    loads: Tensor | None = None


class MoMForCausalLM(MemoryModel):
    """A causal language model of linear memories.

    Args:
        config: the model's configuration.
    Raises:
        ConfigError: if the decoder is of a kind whose attention cannot be replaced.
    Source:
        MoM: Linear Sequence Modeling with Mixture-of-Memories, arXiv:2502.13685.
    """

    config: MoMConfig

    def __init__(self, config: MoMConfig) -> None:
        super().__init__(config)
        self.base = new_base(config)
        self.graft = _replace_attention(self.base, config)
        self.segmented = SegmentedDecoder(self.base, _ENDLESS, graft=self.graft)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The decoder's own rules have been applied to the memories' weights before; theirs replace them.
        if module is self:
            for layer in self.memory_layers:
                initialise(layer)
        else:
            super()._init_weights(module)

    @property
    def memory_layers(self) -> list[MemoryLayer]:
        """The memory layers in block order."""
        return [module for module in self.base.modules() if isinstance(module, MemoryLayer)]

    def num_active_parameters(self) -> int:
        """Return how many parameters take part in the computation for one token (`active_parameters`)."""
        return active_parameters(self)

    @property
    def balance_weight(self) -> float:
        """What the balance loss is multiplied by before it joins the loss."""
        return float(self.config.balance_weight)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        The decoder's own switch stays off, because it drops the cache that carries the state.
        `gradient_checkpointing_kwargs` are accepted as Hugging Face passes them; only `use_reentrant=False` exists.
        """
        self._enable_checkpointing(gradient_checkpointing_kwargs)

    @property
    def block_length(self) -> int:
        """Tokens per row that `memorize` reads at once."""
        return _BLOCK_LENGTH

    @property
    def call_length(self) -> int:
        """Tokens per row that are read at once where no gradient is wanted, however long a text is."""
        return _CALL_LENGTH

    def _blank_state(self, batch_size: int) -> MemoryState:
        """Return the state before the first token."""
        return MemoryState(self.segmented.initial_state(batch_size))

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
        output_routing: bool = False,
        **kwargs: Any,
    ) -> MoMOutput:
        """Compute next-token logits, and the loss if labels are given.

        Args:
            input_ids: token ids, [B, T], any T >= 1.
            attention_mask: 1 for real tokens, 0 for padding anywhere; [B, T], or longer when earlier columns are
                included (its last T columns count). Logits at masked positions are undefined.
            past_key_values: cache of earlier calls; it is given the new state.
            inputs_embeds: embeddings instead of ids, [B, T, D].
            labels: ids to predict, shifted inside, -100 = ignored, [B, T]. While training, the balance loss times
                `config.balance_weight` is added.
            use_cache: whether to return a cache; default: not while training.
            logits_to_keep: number of last columns to compute logits for (0 = all), or their indices.
            memory: state to go on from, with as many rows as the input; it is not changed, the new one is in the cache
                that is returned. None = a fresh one, or that of `past_key_values`.
            output_routing: whether to return the balance loss and the loads.
        Returns:
            Logits [B, columns kept, vocabulary], loss, cache, balance loss, loads.
        Raises:
            ShapeError: for inputs of the wrong shape or dtype, or ids outside the vocabulary.
            StateError: for a cache or memory that is not this model's or of another batch size, or for both at once.
        """
        balances = labels is not None and self.training and self.balance_weight > 0
        found: list[RoutingStatistics] = []
        read = partial(self._stream, found=found if balances or output_routing else None)
        past_key_values = self._cache_with(memory, past_key_values, kwargs)
        logits, cache = self._read_call(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, logits_to_keep, read
        )
        balance = self.balance(found) if found else None
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if balances and balance is not None:
                loss = loss + self.balance_weight * balance.to(loss.dtype)
        loads = torch.stack([load(statistics) for statistics in found]) if found else None
        return MoMOutput(loss=loss, logits=logits, past_key_values=cache, balance_loss=balance, loads=loads)

    def balance(self, layers: list[RoutingStatistics]) -> Tensor:
        """Return how unevenly memories were used, by the formula the configuration chose."""
        return balance_loss(layers, cast(Balance, self.config.balance_loss))

    def _check_state(self, state: MemoryState) -> None:
        if type(state) is not MemoryState:
            raise StateError(f"the memory is of another model: expected a MemoryState, got a {type(state).__name__}")
        self.segmented.check_state(state.decoder)

    def _stream(
        self,
        inputs: Tensor,
        mask: np.ndarray | None,
        state: MemoryState,
        wanted: np.ndarray | None,
        carry_on: bool,
        found: list[RoutingStatistics] | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Read an input; returns the logits of the wanted columns [B, kept, V] and the new state.

        Args:
            found: how the routers chose is put here; None = nobody asks.
        """
        length = _ENDLESS if torch.is_grad_enabled() else _CALL_LENGTH
        batch_size, width = inputs.shape[:2]
        if count_calls(mask, width, state.counts, length) == 0:  # every token is masked: nothing happens
            return self._no_logits(inputs, wanted), state
        real = width if mask is None else mask.sum(axis=1)
        self.segmented.check_positions(np.asarray(state.counts) + real)
        collector = ColumnCollector(batch_size, width, wanted)
        decoder = replace(state.decoder, routing=None if found is None else ())
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for call in plan_calls(mask, width, state.counts, length):
            slots = collector.slots(call)
            logits, decoder = self.segmented.run(
                gather_columns(inputs, call), call, decoder, slots, recompute_blocks=recomputes
            )
            collector.add(logits, call, slots)
        if found is not None and decoder.routing is not None:
            found[:] = joined_statistics(tuple(found), decoder.routing)
        return collector.result(), replace(state, decoder=replace(decoder, routing=None))


def _replace_attention(base: PreTrainedModel, config: MoMConfig) -> Graft:
    """Put memories in the place of the attention of the blocks that the configuration names; return the structure.

    Raises:
        ConfigError: if a block that is to change has no attention.
    """
    graft = find_graft(base, config.blocks_path, config.attention_name)
    types = config.layer_types or ["mom" if block.attention is not None else "own" for block in graft.blocks]
    blocks = []
    for index, (block, layer_type) in enumerate(zip(graft.blocks, types, strict=True)):
        if layer_type == "own":
            blocks.append(block)
            continue
        if block.attention is None:
            able = [i for i, other in enumerate(graft.blocks) if other.attention is not None]
            raise ConfigError(
                f"layer_types[{index}] is {layer_type}, but block {index} of {type(base).__name__} has no attention; "
                f"blocks with one: {able}"
            )
        if layer_type in ("full_attention", "sliding_attention"):
            window = config.sliding_window if layer_type == "sliding_attention" else None
            blocks.append(replace(block, window=window, native_window=window == block.window))
            continue
        name = next(name for name, child in block.module.named_children() if child is block.attention)
        layer, taken = _memory_layer(config, layer_type, index), num_values_taken(block.module, name)
        mixer = MemoryMixer(layer, index, taken).to(base.dtype)
        setattr(block.module, name, mixer)
        blocks.append(Block(block.module, "memory", mixer, None))
    return Graft(blocks, graft.learned_positions)


def _memory_layer(config: MoMConfig, layer_type: str, index: int) -> LinearMemory | MixtureOfMemories:
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "rule": config.rule,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "value_dim": config.value_dim,
        "layer_index": index,
        "num_layers": config.num_hidden_layers,
        "conv_size": config.conv_size,
        "num_slots": config.num_slots,
        "form": config.form,
        "norm_eps": config.norm_eps,
        "output_gate": config.output_gate,
        "initial_output": fresh_output_scale(config),
        **(config.rule_options or {}),
    }
    if layer_type == "memory":
        return LinearMemory(**sizes)
    return MixtureOfMemories(
        num_memories=config.num_memories,
        top_k=config.top_k,
        shared_memory=config.shared_memory,
        single_kv_proj=config.single_kv_proj,
        capacity=config.capacity,
        dispatch=config.dispatch,
        **sizes,
    )
