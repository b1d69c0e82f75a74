"""Configuration of RMT and ARMT: a Hugging Face decoder configuration plus the memory that segments hand on."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mnemon.errors import ConfigError
from mnemon.models.composite_config import CompositeConfig

MEMORIES = ("tokens", "associative")
_KEY_DIM, _FEATURE_ORDER = 64, 3


@strict
class RMTConfig(CompositeConfig):
    """Describe an RMT model.

    Args:
        base_config: configuration of the decoder (an object, or a dict with `model_type`).
        memory: "tokens" (RMT: the memory tokens' outputs are the next segment's memory) or "associative" (ARMT: they
            are written to a matrix in every block).
        num_memory_tokens: memory tokens m. A segment costs its length and 2m tokens more ("associative": m).
        segment_length: tokens C per segment. The decoder sees one segment and the memory, nothing else.
        key_dim: with "associative", width of queries and keys before the feature map; None = 64.
        feature_order: with "associative", order of the feature map, which has 2 * order * key_dim features; None = 3.
        gate_stretch: with "associative", how far the write strength is stretched beyond (0, 1) before it is cut off
            there, so that filler can be left unwritten (as in `LM2Config`); 0 = the paper's sigmoid.
        bptt_segments: segments that gradients flow through; None = all.
        blocks_path: where the decoder's blocks are, as a dotted path such as `model.layers`; None = found by structure.
        attention_name: name of the attention inside a block, such as `self_attn`; None = found by structure.
    Raises:
        ConfigError: for an unknown key (the nearest known one is named) or a value out of range.
    Source:
        Recurrent Memory Transformer, arXiv:2207.06881; Associative Recurrent Memory Transformer, arXiv:2407.04841.
    """

    model_type = "rmt"

    memory: str = "tokens"
    num_memory_tokens: int = 16
    segment_length: int = 512
    key_dim: int | None = None
    feature_order: int | None = None
    gate_stretch: float = 0.0
    bptt_segments: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        assert isinstance(self.base_config, PreTrainedConfig)  # made so by the common part
        if self.base_config.model_type == "mom":
            raise ConfigError("mom has memories in the place of its attention; expected a plain decoder")
        if self.memory not in MEMORIES:
            raise ConfigError(f"memory must be one of {', '.join(MEMORIES)}, got {self.memory!r}")
        for name, default in (("key_dim", _KEY_DIM), ("feature_order", _FEATURE_ORDER)):
            value = getattr(self, name)
            if self.is_associative and value is None:
                setattr(self, name, default)
            elif not self.is_associative and value is not None:
                raise ConfigError(f'{name} is an option of memory="associative", got memory="tokens"; leave it out')
        if not 0.0 <= self.gate_stretch < 1.0:
            raise ConfigError(f"gate_stretch must be at least 0 and below 1, got {self.gate_stretch}")
        if self.gate_stretch and not self.is_associative:
            raise ConfigError('gate_stretch is an option of memory="associative", got memory="tokens"; leave it out')
        self._check_at_least_one("num_memory_tokens", "segment_length", "key_dim", "feature_order", "bptt_segments")

    @property
    def is_associative(self) -> bool:
        """Whether every block has an associative memory (ARMT)."""
        return self.memory == "associative"

    @property
    def frame_length(self) -> int:
        """Positions of the decoder that a whole segment takes, memory tokens included."""
        return self.segment_length + self.num_memory_tokens * (1 if self.is_associative else 2)
