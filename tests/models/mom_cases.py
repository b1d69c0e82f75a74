"""Tiny MoM models in float64 for the contract tests: memories alone, beside attention, under an LM2 bank."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from lm2_cases import SEGMENT, lfm2_config, llama_config
from transformers import MistralConfig, PreTrainedConfig

from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.memory_model import MemoryModel
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.modeling_mom import MoMForCausalLM
from mnemon.models.registration import register

register()  # a configuration inside another is looked up by its kind
SLIDING = 6
SHALLOW = llama_config(num_hidden_layers=2)
MIXED = {"layer_types": ["mom", "sliding_attention", "memory"], "sliding_window": SLIDING}


def mistral_config() -> MistralConfig:
    """A three-block Mistral whose own window is not the one that the hybrids ask for."""
    sizes = llama_config().to_dict()
    wanted = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
    wanted += "initializer_range max_position_embeddings bos_token_id eos_token_id pad_token_id"
    return MistralConfig(**{name: sizes[name] for name in wanted.split()}, sliding_window=4)


def mom_config(base_config: PreTrainedConfig | None = None, **options: Any) -> MoMConfig:
    """Three memories of which a token goes to two, and the shared one; small heads. Fresh memories are heard."""
    sizes: dict[str, Any] = {"num_memories": 3, "top_k": 2, "num_heads": 2, "head_dim": 8, "initial_output": 1.0}
    return MoMConfig(base_config=llama_config() if base_config is None else base_config, **(sizes | options))


def mom(base_config: PreTrainedConfig | None = None, seed: int = 0, **options: Any) -> MoMForCausalLM:
    """Build a model in float64."""
    torch.manual_seed(seed)
    return MoMForCausalLM(mom_config(base_config, **options)).double().eval()


def lm2_on_mom(seed: int = 0, **options: Any) -> LM2ForCausalLM:
    """An LM2 bank beside the memories and the window of a MoM model."""
    torch.manual_seed(seed)
    sizes = {"num_slots": 5, "slot_dim": 12, "num_memory_heads": 3, "segment_length": SEGMENT, "retention": 0.7}
    return LM2ForCausalLM(LM2Config(base_config=mom_config(**(MIXED | options)), **sizes)).double().eval()


BUILDERS: dict[str, Callable[[], MemoryModel]] = {
    "mom": mom,
    "mom-mamba2": lambda: mom(SHALLOW, rule="mamba2", capacity=0.6),
    "mom-gsa": lambda: mom(SHALLOW, rule="gsa", single_kv_proj=True, num_slots=5),
    "mom-retnet": lambda: mom(SHALLOW, rule="retnet", shared_memory=False, top_k=1, dispatch="packed"),
    "mom-ttt": lambda: mom(SHALLOW, rule="ttt", num_memories=2, top_k=1, conv_size=0),
    "memory": lambda: mom(rule="gla", layer_types=["memory"] * 3),
    "mom-sliding": lambda: mom(**MIXED),
    "mistral-both": lambda: mom(
        mistral_config(), layer_types=["full_attention", "mom", "sliding_attention"], sliding_window=SLIDING
    ),
    "lfm2-mom": lambda: mom(lfm2_config()),
    "lm2-on-mom": lm2_on_mom,
}
CASES = list(BUILDERS)
GROWING = {"mistral-both"}  # full attention keeps every key


@functools.lru_cache
def case(name: str) -> MemoryModel:
    """Return the model of one of `CASES`."""
    return BUILDERS[name]()
