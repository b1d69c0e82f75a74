"""RMT and ARMT: a Hugging Face decoder that reads a text segment by segment, with memory tokens in every segment.

The decoder is called once per segment, on the segment's embeddings and memory tokens around them
(`mnemon.models.memory_token_segments`); it sees nothing of earlier segments but the memory. What is carried is an
`RMTState`, or an `ARMTState` where every block has an associative memory. The mathematics is in `docs/rmt.md`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
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
from mnemon.layers.associative_memory import AssociativeMemory
from mnemon.layers.memory_diagnostics import MemoryDiagnostics
from mnemon.layers.memory_tokens import MemoryTokens
from mnemon.models.base_model import as_base, freeze
from mnemon.models.configuration_rmt import RMTConfig
from mnemon.models.memory_model import MemoryModel, SegmentRunner, initialise, new_base
from mnemon.models.memory_token_segments import AssociativeSegments, TokenSegments
from mnemon.models.segmented_decoder import SegmentedDecoder
from mnemon.models.state import ARMTState, MemoryCache, MemoryState, RMTState

_SAMPLED_IDS = 4096  # embeddings looked at to learn their scale


@dataclass
class RMTOutput(CausalLMOutputWithPast):
    """Hugging Face's output, and what the memory did.

    Attributes:
        diagnostics: means by name, scalars (see `MemoryDiagnostics`), if they were asked for.
    """

    diagnostics: dict[str, Tensor] | None = None


class RMTForCausalLM(MemoryModel):
    """A causal language model with a recurrent memory of tokens.

    The decoder lives unchanged under `base.`, what the memory has learned under `memory.`. `forward` takes inputs of
    any length; it cuts them into segments of `config.segment_length` real tokens per row.

    Args:
        config: the model's configuration.
    Raises:
        ConfigError: if the decoder is of a kind that cannot be run segment by segment, or has too few learned
            positions for a segment and its memory tokens.
    Source:
        Recurrent Memory Transformer, arXiv:2207.06881; Associative Recurrent Memory Transformer, arXiv:2407.04841.
    """

    config: RMTConfig

    def __init__(self, config: RMTConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.base = new_base(config) if base is None else base
        self.segmented = SegmentedDecoder(
            self.base, config.segment_length, blocks_path=config.blocks_path, attention_name=config.attention_name
        )
        self._check_positions()
        self.gradient_checkpointing = False
        self.memory = nn.ModuleDict({"tokens": MemoryTokens(config.num_memory_tokens, config.hidden_size)})
        if config.is_associative:
            sizes = (config.hidden_size, cast(int, config.key_dim), cast(int, config.feature_order))
            self.memory["associations"] = nn.ModuleList(
                AssociativeMemory(*sizes, gate_stretch=config.gate_stretch) for _ in self.blocks
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The decoder's own rules have been applied to the projections before; the memories' own replace them.
        if module is self:
            for memory in self.associative_memories:
                initialise(memory)
            self._initialise_tokens()
        else:
            super()._init_weights(module)

    def _initialise_tokens(self) -> None:
        """Draw memory tokens of the scale of token embeddings, unless they were loaded."""
        weight = self.memory_tokens.weight
        if getattr(weight, "_is_hf_initialized", False):
            return
        size = self.config.vocab_size
        ids = torch.linspace(0, size - 1, min(size, _SAMPLED_IDS), device=self._embedding_weight().device).long()
        init.normal_(weight, std=float(self.get_input_embeddings()(ids).float().std()))

    @classmethod
    def from_base(cls, model_or_name: PreTrainedModel | str | Path, freeze_base: bool = False, **options: Any) -> Self:
        """Put a new memory around a pretrained decoder.

        With `memory="associative"` a new memory holds nothing and changes nothing: the logits of every segment are
        those of the decoder on that segment alone. With `memory="tokens"` the decoder meets embeddings that it has
        never seen, and has to be trained with them.

        Args:
            model_or_name: a loaded causal language model (used as it is, not copied), with or without PEFT layers, or
                a folder, shipped checkpoint or hub name.
            freeze_base: train the memory alone: the base's own weights no longer require gradients.
            **options: fields of `RMTConfig`.
        Raises:
            ConfigError: if an option is wrong, or the decoder cannot be run segment by segment: of a kind that is not
                understood, or with other logits when it reads a text in pieces (tried on a few tokens).
            CheckpointError: if there is no such model, or its files are damaged.
        """
        base = as_base(model_or_name)
        config = RMTConfig(base_config=base.config, dtype=base.dtype, **options)
        training = base.training
        model = cls(config, base)  # a decoder that has its weights keeps them
        model.segmented.verify(base)
        model.memory.to(device=base.device, dtype=base.dtype)
        if freeze_base:
            freeze(base)
        return model.train(training)

    @property
    def memory_tokens(self) -> MemoryTokens:
        """The trained memory tokens."""
        return cast(MemoryTokens, self.memory["tokens"])

    @property
    def associative_memories(self) -> list[AssociativeMemory]:
        """The associative memories in block order; empty with `memory="tokens"`."""
        if not self.config.is_associative:
            return []
        return list(cast("Iterable[AssociativeMemory]", self.memory["associations"]))

    @property
    def has_bounded_state(self) -> bool:
        """True: keys are kept within a segment only."""
        return True

    @property
    def longest_text(self) -> None:
        """None: no segment sees another, so a memory can be of any number of tokens."""
        return None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute each segment in the backward pass instead of keeping its activations.

        The whole segment, a pure function of (tokens, state), is checkpointed. `gradient_checkpointing_kwargs` are
        accepted as Hugging Face passes them; only `use_reentrant=False` exists.
        """
        self._enable_checkpointing(gradient_checkpointing_kwargs)

    def _blank_state(self, batch_size: int) -> MemoryState:
        """Return the state before the first token."""
        decoder = self.segmented.initial_state(batch_size)
        if self.config.is_associative:
            return ARMTState(decoder, tuple(memory.empty(batch_size) for memory in self.associative_memories))
        return RMTState(decoder, self.memory_tokens.rows(batch_size))

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
        **kwargs: Any,
    ) -> RMTOutput:
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
            knock_out_memory: let every segment find the memory as the first one does: the knocked-out control.
            output_diagnostics: whether to return what the memory did.
        Returns:
            Logits [B, columns kept, vocabulary], loss, cache, diagnostics.
        Raises:
            ShapeError: for inputs of the wrong shape or dtype, or ids outside the vocabulary.
            StateError: for a cache or memory that is not this model's or of another batch size, or for both at once.
        """
        collector = MemoryDiagnostics() if output_diagnostics else None
        read = partial(self._stream, knock_out=knock_out_memory, diagnostics=collector)
        past_key_values = self._cache_with(memory, past_key_values, kwargs)
        logits, cache = self._read_call(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, logits_to_keep, read
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        means = None if collector is None else collector.means()
        return RMTOutput(loss=loss, logits=logits, past_key_values=cache, diagnostics=means)

    def _check_positions(self) -> None:
        """Refuse a decoder with learned positions that do not hold a segment and its memory tokens."""
        table, needed = self.segmented.graft.learned_positions, self.config.frame_length
        if table is not None and needed > table:
            raise ConfigError(
                f"segment_length={self.config.segment_length} and its memory tokens need {needed} positions, "
                f"{self.base.config.model_type} has learned {table}; shorten the segments"
            )

    def _check_state(self, state: Any) -> None:
        expected = [list(tensor.shape[1:]) for tensor in _memory_of(self._blank_state(1))]
        found = [list(tensor.shape[1:]) for tensor in _memory_of(state)]
        if found != expected:
            raise StateError(
                f"the memory is of another model: it holds tensors of shapes {found or 'unknown'} per row, this one "
                f"{expected}"
            )
        self.segmented.check_state(state.decoder)

    def _stream(
        self,
        inputs: Tensor,
        mask: np.ndarray | None,
        state: Any,
        wanted: np.ndarray | None,
        carry_on: bool,
        knock_out: bool = False,
        diagnostics: MemoryDiagnostics | None = None,
    ) -> tuple[Tensor, Any]:
        """Read an input; returns the logits of the wanted columns [B, kept, V] and the new state."""
        options: dict[str, Any] = {
            "knocked_out": knock_out,
            "keep_pieces": self.training and torch.is_grad_enabled(),
            "recomputes": self._recomputes,
            "diagnostics": diagnostics,
        }
        runner: SegmentRunner
        if self.config.is_associative:
            runner = AssociativeSegments(self.associative_memories, self.segmented, self.memory_tokens, **options)
        else:
            runner = TokenSegments(self.segmented, self.memory_tokens, **options)
        return self._run_segments(runner, inputs, mask, state, wanted, carry_on)


def _memory_of(state: Any) -> list[Tensor]:
    """Return what a state holds beside the decoder's part; nothing for a state of another kind."""
    if isinstance(state, RMTState):
        return [state.memory]
    return [tensor for held in state.associations for tensor in held] if isinstance(state, ARMTState) else []
