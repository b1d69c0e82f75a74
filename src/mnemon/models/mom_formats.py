"""Configurations of the published checkpoints of MoM and Gated DeltaNet, to ours and back.

Three formats are known by their `model_type`: `mom` (flash-linear-attention), `mom_gated_deltanet` (the MoM authors'
release) and `gated_deltanet` (flash-linear-attention, one memory per layer). A MoM of ours calls itself `mom` too; only
ours has a `base_config`. Which tensor is which is in `mnemon.models.mom_tensors`.

Source: MoM: Linear Sequence Modeling with Mixture-of-Memories, arXiv:2502.13685; Gated Delta Networks,
arXiv:2412.06464; names and default values are those of the configurations published with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from mnemon.errors import CheckpointError, ConfigError
from mnemon.models.configuration_mom import MoMConfig

MOM, RELEASED, SINGLE = "mom", "mom_gated_deltanet", "gated_deltanet"
_ACTIVATIONS = ("swish", "silu")
_DOWN = "model.layers.0.mlp.down_proj.weight"

# Keys that change how fast something is computed, or training, and not what a model is.
_WITHOUT_EFFECT = frozenset(
    "attn_mode fuse_norm fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy fuse_conv_l2 use_l2warp hidden_ratio "
    "use_layer_wise_balance torch_dtype auto_map model_type transformers_version".split()
)
# The authors' first release had other names for two keys.
_OLDER_NAMES = {"num_experts": "num_memories", "single_expert": "single_kv_proj", "use_gate": "use_output_gate"}

_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 2048,
        "intermediate_size": None,
        "hidden_act": "swish",
        "num_hidden_layers": 24,
        "num_heads": 4,
        "head_dim": 256,
        "expand_v": 1.0,
        "use_output_gate": True,
        "use_short_conv": True,
        "conv_size": 4,
        "norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn": None,
    }
)
_ROUTED_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "num_memories": 4,
        "topk": 2,
        "capacity": 1.0,
        "aux_loss_scale": 0.01,
        "shared_mem": True,
        "single_kv_proj": False,
    }
)


@dataclass(frozen=True)
class Format:
    """A published format.

    Attributes:
        model_type: what its configuration calls itself.
        defaults: values of the keys that a configuration leaves out.
        required: keys that must have one value, because a MoM of ours has no other: key -> (value, what else it means).
        several: whether layers have several memories and a router, not a single memory.
        unused: tensors of a layer that were trained along and never read.
    """

    model_type: str
    defaults: Mapping[str, Any]
    required: Mapping[str, tuple[Any, str]]
    several: bool
    unused: tuple[str, ...] = ()


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        MOM: Format(
            MOM,
            {**_DEFAULTS, **_ROUTED_DEFAULTS},
            {
                "mom_backend": ("gated_deltanet", "another update rule"),
                "attnres_block_size": (None, "attention over residuals"),
            },
            several=True,
        ),
        RELEASED: Format(
            RELEASED,
            {
                **_DEFAULTS,
                **_ROUTED_DEFAULTS,
                "num_heads": 6,
                "expand_v": 2.0,
                "num_hidden_layers": 21,
                "num_memories": 8,
                "shared_mem": False,
            },
            {"norm_first": (False, "memories that read the residual stream without a norm")},
            several=True,
            unused=("attn.D",),
        ),
        SINGLE: Format(
            SINGLE,
            {**_DEFAULTS, "num_heads": 6, "expand_v": 2.0, "num_hidden_layers": 21},
            {
                "allow_neg_eigval": (False, "write strengths up to 2"),
                "attnres_block_size": (None, "attention over residuals"),
                "norm_first": (False, "norms in another place"),
            },
            several=False,
            unused=("attn.D",),
        ),
    }
)


def is_ours(fields: Mapping[str, Any]) -> bool:
    """Say whether a config.json is of a MoM of ours."""
    return fields.get("model_type") == MoMConfig.model_type and "base_config" in fields


def find_format(fields: Mapping[str, Any]) -> Format:
    """Return the published format that a config.json is in.

    Raises:
        ConfigError: if it is in none.
    """
    model_type = fields.get("model_type")
    published = FORMATS.get(model_type) if isinstance(model_type, str) else None
    if published is None:
        raise ConfigError(f"cannot convert a model of type {model_type!r}; expected one of {', '.join(FORMATS)}")
    return published


def read_config(
    published: Format, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tied: bool
) -> tuple[MoMConfig, list[str]]:
    """Turn a published configuration into ours.

    Args:
        published: its format.
        fields: its config.json.
        shapes: shapes of the tensors; the feed-forward's width is often found only there.
        tied: whether the head is the embedding.

    Returns:
        Our configuration with a Llama decoder, and remarks for the user.

    Raises:
        ConfigError: for a value that a MoM of ours cannot have.
        CheckpointError: if the width of the feed-forward cannot be found.
    """
    values = _with_current_names(fields)
    notes = _unknown_keys(published, values)
    values = {**published.defaults, **values}
    _refuse_unrepresentable(published, values)
    numbers = {
        name: _whole(values, name)
        for name in ("hidden_size", "num_hidden_layers", "num_heads", "head_dim", "conv_size", "vocab_size")
    }
    width = values["intermediate_size"]
    if width is None:
        if len(shapes.get(_DOWN, ())) != 2:
            raise CheckpointError(f"intermediate_size is not in the configuration and {_DOWN} not in the weights")
        width = shapes[_DOWN][1]
    heads, hidden = numbers["num_heads"], numbers["hidden_size"]
    base = LlamaConfig(
        vocab_size=numbers["vocab_size"],
        hidden_size=hidden,
        intermediate_size=_whole({"intermediate_size": width}, "intermediate_size"),
        num_hidden_layers=numbers["num_hidden_layers"],
        num_attention_heads=heads if hidden % heads == 0 else 1,  # of the attention that the memories take the place of
        rms_norm_eps=_positive(values, "norm_eps"),
        max_position_embeddings=_whole(values, "max_position_embeddings"),
        initializer_range=_positive(values, "initializer_range"),
        tie_word_embeddings=tied,
        use_cache=bool(values["use_cache"]),
        **{name: values[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    options: dict[str, Any] = {
        "base_config": base,
        "rule": "gated_delta_net",
        "num_heads": heads,
        "head_dim": numbers["head_dim"],
        "value_dim": _value_dim(heads, numbers["head_dim"], _positive(values, "expand_v")),
        "conv_size": numbers["conv_size"] if values["use_short_conv"] else 0,
        "norm_eps": _positive(values, "norm_eps"),
    }
    if not published.several:
        return MoMConfig(**options, layer_types=["memory"] * numbers["num_hidden_layers"]), notes
    if values["capacity"] is not None and values["capacity"] != 1:
        notes.append(_read_capacity(published, values))
    config = MoMConfig(
        **options,
        num_memories=_whole(values, "num_memories"),
        top_k=_whole(values, "topk"),
        shared_memory=bool(values["shared_mem"]),
        single_kv_proj=bool(values["single_kv_proj"]),
        # flash-linear-attention averages over all layers whatever `use_layer_wise_balance` says; the release does not.
        balance_loss="layer" if published.model_type == RELEASED else "global",
        balance_weight=_positive(values, "aux_loss_scale", zero=True),
    )
    return config, notes


def published_config(config: MoMConfig) -> tuple[Format, dict[str, Any], list[str]]:
    """Turn a configuration of ours into one of flash-linear-attention.

    Returns:
        The format (`mom`, or `gated_deltanet` if every layer has a single memory), its config.json without dtype, and
        remarks for the user.

    Raises:
        ConfigError: if flash-linear-attention has no such model, with the reason.
    """
    base = config.base_config
    assert isinstance(base, PreTrainedConfig)
    kinds = set(config.layer_types or ["mom"])
    single = kinds == {"memory"}
    reasons = {
        f"the decoder is a {base.model_type}, not a llama": base.model_type != "llama",
        f"the update rule is {config.rule}, not gated_delta_net": config.rule != "gated_delta_net",
        f"the layers differ ({', '.join(sorted(kinds))})": kinds not in ({"mom"}, {"memory"}),
        f"memories take a share of {config.capacity} of the tokens": config.capacity is not None
        and config.capacity < 1,
        "the memories have no output gate": not config.output_gate,
        "it has no convolution (conv_size 0)": config.conv_size == 0 and not single,
    }
    value_dim = config.value_dim or config.head_dim
    if base.model_type == "llama":
        epsilons = f"{config.norm_eps:g} in the memories and {base.rms_norm_eps:g} elsewhere"
        reasons |= {
            f"the activation is {base.hidden_act}, not silu": base.hidden_act not in _ACTIVATIONS,
            "the feed-forward has biases": bool(base.mlp_bias),
            f"the norms' epsilon is {epsilons}, not the same": config.norm_eps != base.rms_norm_eps,
        }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"flash-linear-attention has no such model: {reason}")
    expand_v = value_dim / config.head_dim
    assert _value_dim(config.num_heads, config.head_dim, expand_v) == value_dim
    gate = "use_gate" if single else "use_output_gate"
    fields: dict[str, Any] = {
        "architectures": ["GatedDeltaNetForCausalLM" if single else "MomForCausalLM"],
        "model_type": SINGLE if single else MOM,
        "attn_mode": "chunk",
        "hidden_size": config.hidden_size,
        "intermediate_size": base.intermediate_size,
        "hidden_act": "swish",
        "num_hidden_layers": config.num_hidden_layers,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "expand_v": expand_v,
        gate: True,
        "use_short_conv": config.conv_size > 0,
        "conv_size": config.conv_size or _DEFAULTS["conv_size"],
        "norm_eps": config.norm_eps,
        "max_position_embeddings": base.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": base.tie_word_embeddings,
        "initializer_range": base.initializer_range,
        "use_cache": base.use_cache,
        "pad_token_id": base.pad_token_id,
        "bos_token_id": base.bos_token_id,
        "eos_token_id": base.eos_token_id,
        "attn": None,
    }
    if single:
        return FORMATS[SINGLE], fields, []
    fields |= {
        "num_memories": config.num_memories,
        "topk": config.top_k,
        "capacity": 1.0,
        "aux_loss_scale": config.balance_weight,
        "shared_mem": config.shared_memory,
        "single_kv_proj": config.single_kv_proj,
        "mom_backend": "gated_deltanet",
    }
    notes = []
    if config.balance_loss != "global":
        notes.append("balance_loss is 'layer' here; flash-linear-attention averages over all layers when it trains")
    return FORMATS[MOM], fields, notes


def _with_current_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with today's names of its keys.

    Raises:
        ConfigError: if the same thing is said twice and differently.
    """
    values = dict(fields)
    for older, name in _OLDER_NAMES.items():
        if older in values:
            value = values.pop(older)
            if values.setdefault(name, value) != value:
                raise ConfigError(f"{older} is {value} and {name} is {values[name]}, two names of one thing; keep one")
    return values


def _unknown_keys(published: Format, values: Mapping[str, Any]) -> list[str]:
    """Return a remark on keys that nothing here knows."""
    library = PreTrainedConfig().to_dict()
    known = {
        *published.defaults,
        *published.required,
        *_WITHOUT_EFFECT,
        *library,
        "num_v_heads",
        "output_gate_activation",
    }
    unknown = sorted(key for key in values if key not in known and not key.startswith("_"))
    return [f"not known and left out: {', '.join(unknown)}"] if unknown else []


def _refuse_unrepresentable(published: Format, values: Mapping[str, Any]) -> None:
    for key, (expected, meaning) in published.required.items():
        if values.get(key, expected) != expected:
            raise ConfigError(f"{key} is {values[key]!r} ({meaning}); only {expected!r} can be converted")
    if values["attn"] is not None:
        raise ConfigError("attn is set (some layers are attention); only models of memories alone can be converted")
    if values["hidden_act"] not in _ACTIVATIONS:
        raise ConfigError(f"hidden_act is {values['hidden_act']!r}; only swish (silu) can be converted")
    if values.get("output_gate_activation", "swish") not in _ACTIVATIONS:
        raise ConfigError(
            f"output_gate_activation is {values['output_gate_activation']!r}; only swish can be converted"
        )
    if not values["use_output_gate"]:
        raise ConfigError("use_output_gate (or use_gate) is false; only layers with an output gate can be converted")
    if values.get("num_v_heads") not in (None, values["num_heads"]):
        raise ConfigError(
            f"num_v_heads is {values['num_v_heads']}; only num_heads = {values['num_heads']} can be converted"
        )


def _read_capacity(published: Format, values: Mapping[str, Any]) -> str:
    """Return a remark on a capacity other than 1.

    Raises:
        ConfigError: if the published layer heeds it, in a way that is not causal.
    """
    capacity = _positive(values, "capacity")
    if published.model_type == RELEASED and capacity < 1:
        raise ConfigError(
            f"capacity is {capacity}: the released layer then drops a text's oldest tokens once later ones have come, "
            "which is not causal; only capacity 1 can be converted"
        )
    return f"capacity {capacity} was left out: the published layer drops nothing by it"


def _value_dim(heads: int, head_dim: int, expand_v: float) -> int:
    """Return the width of values per head.

    Raises:
        ConfigError: if it is not a whole number.
    """
    width = round(head_dim * expand_v)
    # The published layers truncate both products.
    if int(head_dim * expand_v) != width or int(heads * head_dim * expand_v) != heads * width:
        raise ConfigError(f"expand_v = {expand_v} times head_dim = {head_dim} must be a whole number of channels")
    return width


def _whole(values: Mapping[str, Any], name: str) -> int:
    value = values[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _positive(values: Mapping[str, Any], name: str, *, zero: bool = False) -> float:
    value = values[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{name} must be a number {'of at least' if zero else 'above'} 0, got {value!r}")
    return float(value)
