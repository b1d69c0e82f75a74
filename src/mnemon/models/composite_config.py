"""What the configurations of all our models have in common: a Hugging Face decoder's configuration inside their own."""

import difflib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from mnemon.errors import ConfigError

# Keys Hugging Face itself writes into or passes to any configuration; everything else must be a field of ours.
_LIBRARY_KEYS = frozenset(
    "model_type _name_or_path name_or_path attn_implementation _attn_implementation _attn_implementation_internal "
    "experts_implementation _experts_implementation_internal torch_dtype num_labels output_attentions use_cache "
    "_commit_hash per_layer_config is_decoder use_bfloat16 vocab_size hidden_size num_hidden_layers "
    "bos_token_id eos_token_id pad_token_id tie_word_embeddings max_position_embeddings".split()
)


@strict
class CompositeConfig(PreTrainedConfig):
    """Configuration of a model around a decoder.

    Args:
        base_config: configuration of the decoder (an object, or a dict with `model_type`).
        blocks_path: where the decoder's blocks are, as a dotted path such as `model.layers`; None = found by structure.
        attention_name: name of the attention inside a block, such as `self_attn`; None = found by structure.
    Raises:
        ConfigError: for an unknown key (the nearest known one is named) or a decoder of a kind that does not fit.
    """

    keys_to_ignore_at_inference = ("past_key_values",)
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}

    base_config: dict[str, Any] | PreTrainedConfig | None = None
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

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        kind = type(self)
        known = sorted(name for name in kind.__dataclass_fields__ if not name.startswith("_"))
        for key in kwargs:
            if key not in _LIBRARY_KEYS:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"
                raise ConfigError(f"{kind.__name__} has no key {key!r}{hint}")

    def _check_at_least_one(self, *names: str) -> None:
        """Refuse numbers below 1; None is fine where the field's type has it."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


def _refuse_unsupported(base_config: PreTrainedConfig) -> None:
    kind = base_config.model_type
    if kind in ("lm2", "rmt"):
        raise ConfigError(f"{kind} has a memory around a decoder already; pass the decoder's own configuration")
    if base_config.is_encoder_decoder:
        raise ConfigError(f"{kind} is an encoder-decoder; expected a decoder-only model")
    if base_config.get_text_config() is not base_config:
        raise ConfigError(f"{kind} reads more than text; pass its text decoder ({kind}_text or alike)")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(base_config, name, None), int):
            raise ConfigError(f"{kind} has no {name}; expected the configuration of a decoder-only language model")


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
