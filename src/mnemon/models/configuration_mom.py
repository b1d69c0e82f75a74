"""Configuration of MoM: a Hugging Face decoder configuration, and memories in the place of its attention."""

from typing import Any

from huggingface_hub.dataclasses import strict

from mnemon.errors import ConfigError
from mnemon.layers.mixture_of_memories import check_routing
from mnemon.models.composite_config import CompositeConfig

LAYER_TYPES = ("mom", "memory", "full_attention", "sliding_attention")
BALANCES = ("global", "layer")
_SAVED_TOP_K = "num_memories_per_token"


@strict
class MoMConfig(CompositeConfig):
    """Describe a MoM model: a decoder some or all of whose attentions are replaced by linear memories.

    Args:
        base_config: configuration of the decoder (an object, or a dict with `model_type`). Its feed-forward layers,
            norms, embeddings and head are used as they are, and the attention of the blocks that keep it.
        rule: update rule of the memories (`mnemon rules` lists them).
        num_memories: routed memories E per layer.
        top_k: memories that a token goes to.
        shared_memory: whether one more memory gets every token.
        num_heads: heads of every memory.
        head_dim: width of keys per head.
        value_dim: width of values per head; None = `head_dim`.
        layer_types: one of "mom", "memory" (a single memory), "full_attention" and "sliding_attention" per block;
            None = "mom" wherever the decoder has attention.
        sliding_window: tokens that "sliding_attention" sees, itself included.
        conv_size: tokens the short convolution sees, 0 = no convolution.
        norm_eps: what the norm of a memory's output adds to the mean square before its root.
        output_gate: False leaves out the output gate of a layer that is published with one.
        initial_output: what the initial weights of the memories' output projections are multiplied by: 1 = a fresh
            memory adds as much as its normalised output, which drowns embeddings of a usual size, 0 = nothing; None =
            the decoder's `initializer_range`, about as much as an embedding has.
        num_slots: slots of a rule with slots; None = `head_dim`.
        single_kv_proj: one projection to keys, values and gates for all memories of a layer, instead of one for each.
        capacity: largest share of a sequence's tokens that a routed memory takes; None = all that come.
        balance_loss: "global" averages the use of memories over layers, "layer" takes every layer and sequence alone
            (`mnemon.layers.routing.balance_loss`).
        balance_weight: what that loss is multiplied by before it is added in training.
        rule_options: hyper-parameters of the rule, by name.
        form: form of the rule that runs, "auto" for the fastest.
        dispatch: how tokens reach their memories: "packed", "in_turn", "dense", or "auto" for the fastest.
        blocks_path: where the decoder's blocks are, as a dotted path such as `model.layers`; None = found by structure.
        attention_name: name of the attention inside a block, such as `self_attn`; None = found by structure.
    Raises:
        ConfigError: for an unknown key (the nearest known one is named) or a value out of range.
    Source:
        MoM: Linear Sequence Modeling with Mixture-of-Memories, arXiv:2502.13685.
    """

    model_type = "mom"

    rule: str = "gated_delta_net"
    num_memories: int = 4
    top_k: int = 2
    shared_memory: bool = True
    num_heads: int = 4
    head_dim: int = 64
    value_dim: int | None = None
    layer_types: list[str] | tuple[str, ...] | None = None
    sliding_window: int | None = None
    conv_size: int = 4
    norm_eps: float = 1e-5
    output_gate: bool = True
    initial_output: float | int | None = None
    num_slots: int | None = None
    single_kv_proj: bool = False
    capacity: float | int | None = None
    balance_loss: str = "global"
    balance_weight: float | int = 0.01
    rule_options: dict[str, Any] | None = None
    form: str = "auto"
    dispatch: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        self.top_k = kwargs.pop(_SAVED_TOP_K, self.top_k)
        super().__post_init__(**kwargs)
        self._check_at_least_one("num_heads", "head_dim", "value_dim", "sliding_window", "num_slots")
        check_routing(self.num_memories, self.top_k, self.capacity, self.dispatch)
        if self.conv_size < 0:
            raise ConfigError(f"conv_size must be at least 0 (no convolution), got {self.conv_size}")
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be above 0, got {self.norm_eps}")
        if self.initial_output is not None and self.initial_output < 0:
            raise ConfigError(f"initial_output must be at least 0, or null, got {self.initial_output}")
        if self.balance_loss not in BALANCES:
            raise ConfigError(f"balance_loss must be one of {', '.join(BALANCES)}, got {self.balance_loss!r}")
        if self.balance_weight < 0:
            raise ConfigError(f"balance_weight must be at least 0, got {self.balance_weight}")
        self._check_layer_types()

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as it is saved: generation would take a `top_k` there for its own."""
        fields: dict[str, Any] = super().to_dict()
        if "top_k" in fields:
            fields[_SAVED_TOP_K] = fields.pop("top_k")
        return fields

    def _get_generation_parameters(self) -> dict[str, Any]:
        """Return what generation would take for its own; older versions of the library find `top_k` and do not save."""
        found: dict[str, Any] = super()._get_generation_parameters()
        return {name: value for name, value in found.items() if name != "top_k"}

    def validate_layer_type(self) -> None:
        """Do nothing: the library's own check knows no memories; `__post_init__` has checked."""

    def _check_layer_types(self) -> None:
        layer_types = list(self.layer_types or ())
        for layer_type in layer_types:
            if layer_type not in LAYER_TYPES:
                raise ConfigError(f"layer_types must be among {', '.join(LAYER_TYPES)}, got {layer_type!r}")
        if self.layer_types is not None and len(layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types names {len(layer_types)} blocks, the base has {self.num_hidden_layers}; give one entry "
                "per block"
            )
        if "sliding_attention" in layer_types and self.sliding_window is None:
            raise ConfigError("layer_types has sliding_attention, which needs a sliding_window; give one in tokens")
        if "sliding_attention" not in layer_types and self.sliding_window is not None:
            raise ConfigError("sliding_window is given, but layer_types has no sliding_attention; leave it out")
