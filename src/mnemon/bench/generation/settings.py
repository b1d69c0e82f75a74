"""What the benchmark of generation measures, and the models it measures: one width and depth, equally many parameters.

Equal are the parameters that one token meets: the feed-forward layers of a model are as wide as it takes to have as
many of them as the plain Llama. A mixture then has more in all, because a token goes to a few of its memories only.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from mnemon.bench.cost import ModelShape
from mnemon.bench.models import DTYPES, llama_config
from mnemon.errors import ConfigError
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.configuration_rmt import RMTConfig
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.modeling_mom import MoMForCausalLM
from mnemon.models.modeling_rmt import RMTForCausalLM
from mnemon.models.parameters import active_parameters
from mnemon.ops import get_rule, list_rules

FAMILIES = ("plain", "lm2", "lm2-full-attention", "rmt", "armt", "mom")
"""Models that are no single memory; the others are named by their update rule."""
GROWING = ("plain", "lm2-full-attention")
"""Models whose state grows with the prefix."""
_WITHIN = 0.02


@dataclass(frozen=True)
class GenerationSettings:
    """What to measure.

    Attributes:
        models: some of `FAMILIES`, and names of update rules, each for a model with one memory of it per block.
        shape: the plain Llama; the others have its width, depth and heads.
        prefixes: tokens read before, rising.
        new_tokens: tokens generated after each prefix.
        repeats: rounds of generation that count, where one does not take long.
        time_limit: seconds for all of a model; a cell that is expected not to fit is left out.
        segment_length: tokens C per segment of LM2, RMT and ARMT.
        attention_span: tokens that LM2's attention sees.
        num_slots: slots of LM2's bank, a quarter of the model's width each.
        num_memory_tokens: memory tokens of RMT and ARMT.
        mixture_rule: update rule of the mixture.
        num_memories, top_k: routed memories of the mixture, and how many a token goes to besides the shared one.
        device, dtype, threads: where and how.
    """

    models: tuple[str, ...]
    shape: ModelShape
    prefixes: tuple[int, ...]
    new_tokens: int = 1024
    repeats: int = 1
    time_limit: float = 75.0
    segment_length: int = 256
    attention_span: int = 512
    num_slots: int = 64
    num_memory_tokens: int = 16
    mixture_rule: str = "gated_delta_net"
    num_memories: int = 4
    top_k: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Read settings back that were written with `asdict`."""
        lists = {name: tuple(content[name]) for name in ("models", "prefixes")}
        return cls(**{**content, **lists, "shape": ModelShape(**content["shape"])})


def model_names(words: list[str]) -> tuple[str, ...]:
    """Return the models that are asked for; `rules` stands for every update rule.

    Raises:
        ConfigError: for a name that is neither a model nor a rule.
    """
    names: list[str] = []
    for word in words:
        if word == "rules":
            names += list_rules()
        elif word in FAMILIES:
            names.append(word)
        elif word in list_rules():
            names.append(get_rule(word).name)
        else:
            raise ConfigError(
                f"--models: unknown {word!r}; expected some of {', '.join(FAMILIES)}, rules (all), or update rules "
                f"({', '.join(list_rules())})"
            )
    return tuple(dict.fromkeys(names))


def describe(name: str, settings: GenerationSettings) -> str:
    """Say in words what a model is."""
    length, span = settings.segment_length, settings.attention_span
    bank = f"a bank of {settings.num_slots} slots beside the attention, segments of {length} tokens"
    tokens = f"{settings.num_memory_tokens} memory tokens, segments of {length} tokens"
    return {
        "plain": "Llama that keeps all keys and values",
        "lm2": f"LM2: {bank}; attention sees {span} tokens",
        "lm2-full-attention": f"LM2: {bank}; attention sees everything",
        "rmt": f"RMT: {tokens}",
        "armt": f"ARMT: an associative memory per block, {tokens}",
        "mom": f"MoM: {settings.num_memories} memories of {settings.mixture_rule} in the place of attention, a token "
        f"goes to {settings.top_k} and a shared one",
    }.get(name, "one memory per block in the place of attention")


def feed_forward_width(name: str, settings: GenerationSettings) -> int:
    """Return the width of the feed-forward layers that gives a model the plain one's number of active parameters.

    Raises:
        ConfigError: if what stands around the feed-forward layers is too large already.
    """
    width = settings.shape.intermediate_size
    wanted, narrow, wide = (
        _count(named, settings, size) for named, size in (("plain", width), (name, width), (name, 2 * width))
    )
    equal = width + round((wanted - narrow) * width / (wide - narrow))
    if equal < 1 or abs(_count(name, settings, equal) - wanted) > _WITHIN * wanted:
        raise ConfigError(
            f"{name} cannot have as few parameters as the plain model with feed-forward layers of width {width}; "
            "choose a greater --feed-forward"
        )
    return equal


def build(name: str, settings: GenerationSettings, intermediate_size: int) -> PreTrainedModel:
    """Build a model of random weights in evaluation mode."""
    torch.manual_seed(0)
    model = _new_model(name, settings, intermediate_size)
    nn.Module.to(model, torch.device(settings.device), DTYPES[settings.dtype])
    return model.eval()


def _count(name: str, settings: GenerationSettings, intermediate_size: int) -> int:
    with torch.device("meta"):
        return active_parameters(_new_model(name, settings, intermediate_size))


def _new_model(name: str, settings: GenerationSettings, intermediate_size: int) -> PreTrainedModel:
    shape = ModelShape(**{**asdict(settings.shape), "intermediate_size": intermediate_size})
    base: Any = llama_config(shape)
    segments: dict[str, Any] = {"base_config": base, "segment_length": settings.segment_length}
    if name == "plain":
        return LlamaForCausalLM(base)
    if name in ("lm2", "lm2-full-attention"):
        span = settings.attention_span if name == "lm2" else None
        return LM2ForCausalLM(LM2Config(**segments, num_slots=settings.num_slots, attention_span=span))
    if name in ("rmt", "armt"):
        memory = "tokens" if name == "rmt" else "associative"
        return RMTForCausalLM(RMTConfig(**segments, memory=memory, num_memory_tokens=settings.num_memory_tokens))
    sizes: dict[str, Any] = {
        "base_config": base,
        "num_heads": shape.num_heads,
        "head_dim": shape.hidden_size // shape.num_heads,
    }
    if name == "mom":
        return MoMForCausalLM(
            MoMConfig(**sizes, rule=settings.mixture_rule, num_memories=settings.num_memories, top_k=settings.top_k)
        )
    return MoMForCausalLM(MoMConfig(**sizes, rule=name, layer_types=["memory"] * shape.num_layers))
