"""Configuration of LM2: a Hugging Face decoder configuration plus the memory beside it."""

import difflib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from mnemon.errors import ConfigError

FLOWS = ("depth", "layer")
# Keys Hugging Face itself writes into or passes to any configuration; everything else must be a field of ours.
_LIBRARY_KEYS = frozenset(
    "model_type _name_or_path name_or_path attn_implementation _attn_implementation _attn_implementation_internal "
    "experts_implementation _experts_implementation_internal torch_dtype num_labels output_attentions use_cache "
    "_commit_hash per_layer_config is_decoder use_bfloat16 vocab_size hidden_size num_hidden_layers "
    "bos_token_id eos_token_id pad_token_id tie_word_embeddings max_position_embeddings".split()
)


@strict
class LM2Config(PreTrainedConfig):
    """Describe an LM2 model.

    Args:
        base_config: configuration of the decoder the memory is grafted on (an object, or a dict with `model_type`).
        num_slots: slots J of the bank. More slots hold more facts and cost 4JW multiply-adds per token and block.
        slot_dim: slot width W; None = a quarter of the model width. W = model width is the paper's.
        num_memory_heads: heads of the memory's attentions; divides `slot_dim`.
        segment_length: tokens C per segment. Tokens read the bank that stood when their segment began.
        flow: "depth" (the paper: one bank runs through the blocks) or "layer" (every block keeps its own bank).
        memory_layers: indices of the blocks with a memory; None = all blocks with attention; [] = no memory at all,
            the plain decoder (restricted to `attention_span` if one is given).
        attention_span: a token sees itself and the `attention_span - 1` tokens before it; None = every earlier token.
            At least `segment_length`, otherwise tokens would be in neither attention nor bank.
        attention_sinks: first tokens that stay visible beyond the span; a pretrained decoder collapses once its first
            tokens are gone. Their keys are moved along, so that no distance exceeds the span plus the sinks.
        read_top_k: slots a token may read per head; None = all.
        retention: share of the bank that one complete pass over all blocks keeps at initialisation, in (0, 1).
        gate_stretch: how far the input and forget gates are stretched beyond (0, 1) before they are cut off there, so
            that they can close and open completely; 0 = the paper's sigmoid.
        bptt_segments: segments that gradients flow through; None = all.
        blocks_path: where the decoder's blocks are, as a dotted path such as `model.layers`; None = found by structure.
        attention_name: name of the attention inside a block, such as `self_attn`; None = found by structure.
    Raises:
        ConfigError: for an unknown key (the nearest known one is named) or a value out of range.
    """

    model_type = "lm2"
    keys_to_ignore_at_inference = ("past_key_values",)
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}

    base_config: dict[str, Any] | PreTrainedConfig | None = None
    num_slots: int = 64
    slot_dim: int | None = None
    num_memory_heads: int = 4
    segment_length: int = 256
    flow: str = "depth"
    memory_layers: list[int] | tuple[int, ...] | None = None
    attention_span: int | None = None
    attention_sinks: int = 0
    read_top_k: int | None = None
    retention: float = 0.9
    gate_stretch: float = 0.0
    bptt_segments: int | None = None
    blocks_path: str | None = None
    attention_name: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        self.base_config = _as_config(self.base_config)
        _refuse_unsupported(self.base_config)
        for mirrored in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs[mirrored] = getattr(self.base_config, mirrored, None)
        # Setting our own choice (None by default) would overwrite the one an already built decoder runs with.
        kwargs.setdefault("attn_implementation", self.base_config._attn_implementation)
        kwargs["tie_word_embeddings"] = False  # tying, if any, is the base's own and happens inside `base.`
        for mirrored in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            kwargs.pop(mirrored, None)
        super().__post_init__(**kwargs)
        self.vocab_size = self.base_config.vocab_size
        self.hidden_size = self.base_config.hidden_size
        self.num_hidden_layers = self.base_config.num_hidden_layers
        if self.slot_dim is None:
            self.slot_dim = max(self.num_memory_heads, self.hidden_size // 4)
        if self.memory_layers is not None:
            self.memory_layers = sorted(self.memory_layers)
        self._check_ranges()

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        known = sorted(name for name in LM2Config.__dataclass_fields__ if not name.startswith("_"))
        for key in kwargs:
            if key not in _LIBRARY_KEYS:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"
                raise ConfigError(f"LM2Config has no key {key!r}{hint}")

    def _check_ranges(self) -> None:
        for name in ("num_slots", "slot_dim", "num_memory_heads", "segment_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("attention_span", "read_top_k", "bptt_segments"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1 or null, got {getattr(self, name)}")
        assert self.slot_dim is not None  # set by __post_init__
        if self.slot_dim % self.num_memory_heads:
            raise ConfigError(
                f"slot_dim={self.slot_dim} is not divisible by num_memory_heads={self.num_memory_heads}; "
                "choose a slot_dim that is a multiple of the heads"
            )
        if self.num_slots > self.slot_dim == 1:
            raise ConfigError(f"num_slots={self.num_slots} needs slot_dim of at least 2 to tell the slots apart, got 1")
        if self.read_top_k is not None and self.read_top_k > self.num_slots:
            raise ConfigError(f"read_top_k={self.read_top_k} exceeds num_slots={self.num_slots}; lower read_top_k")
        if self.flow not in FLOWS:
            raise ConfigError(f"flow must be one of {', '.join(FLOWS)}, got {self.flow!r}")
        if not 0.0 < self.retention < 1.0:
            raise ConfigError(f"retention must lie strictly between 0 and 1, got {self.retention}")
        if not 0.0 <= self.gate_stretch < 1.0:
            raise ConfigError(f"gate_stretch must be at least 0 and below 1, got {self.gate_stretch}")
        if self.attention_span is not None and self.attention_span < self.segment_length:
            raise ConfigError(
                f"attention_span={self.attention_span} is below segment_length={self.segment_length}; some tokens "
                "would be in neither attention nor bank: raise the span or shorten the segments"
            )
        if self.attention_sinks < 0:
            raise ConfigError(f"attention_sinks must be at least 0, got {self.attention_sinks}")
        if self.attention_sinks and self.attention_span is None:
            raise ConfigError(
                f"attention_sinks={self.attention_sinks} needs an attention_span; without one every token stays visible"
            )
        layers = self.memory_layers or ()
        for index in layers:
            if not 0 <= index < self.num_hidden_layers:
                raise ConfigError(
                    f"memory_layers names block {index}, but the base has blocks 0 to {self.num_hidden_layers - 1}"
                )
        if len(set(layers)) != len(layers):
            raise ConfigError(f"memory_layers names a block twice: {list(layers)}")


def _refuse_unsupported(base_config: PreTrainedConfig) -> None:
    kind = base_config.model_type
    if base_config.is_encoder_decoder:
        raise ConfigError(f"{kind} is an encoder-decoder; LM2 needs a decoder-only model")
    if base_config.get_text_config() is not base_config:
        raise ConfigError(f"{kind} reads more than text; pass its text decoder ({kind}_text or alike)")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(base_config, name, None), int):
            raise ConfigError(f"{kind} has no {name}; LM2 needs the configuration of a decoder-only language model")


def _as_config(base_config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if base_config is None:
        base_config = {"model_type": "llama"}  # Hugging Face builds default configurations when it compares them
    if isinstance(base_config, PreTrainedConfig):
        return base_config
    if "model_type" not in base_config:
        raise ConfigError("base_config needs the key model_type (for example llama or lfm2) to say which decoder it is")
    fields = dict(base_config)
    model_type = fields.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise ConfigError(f"base_config: {str(error).splitlines()[0]}") from error
