"""Tiny LM2 models in float64 for the contract tests: every base, both flows, with and without a span; one that has what
the paper's memory has not.
"""

import functools
import itertools
from typing import Any

import torch
from transformers import Lfm2Config, LlamaConfig, PreTrainedConfig

from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.modeling_lm2 import LM2ForCausalLM

VOCABULARY = 50
SEGMENT = 7
# Hugging Face computes norms, rotary angles and softmax of these bases in float32 even for float64 models.
TOLERANCE = 1e-6


def llama_config(**options: Any) -> LlamaConfig:
    """A three-block Llama of width 32 with grouped keys."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaConfig(**(sizes | options))


def lfm2_config(**options: Any) -> Lfm2Config:
    """A four-block LFM2 of width 32: convolution and attention in turn."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"] * 2, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return Lfm2Config(**(sizes | options))


BASES = {"llama": llama_config, "lfm2": lfm2_config}
CASES = [
    f"{base}-{flow}-{'span' if span else 'full'}"
    for base, flow, span in itertools.product(BASES, ("depth", "layer"), (False, True))
]
CASES.append("lfm2-depth-extended")
EXTENSIONS = {"write_conv": 4, "coupled_gates": True, "write_query": "key", "skip_gate": True, "gate_stretch": 0.1}


def lm2(base_config: PreTrainedConfig, seed: int = 0, **options: Any) -> LM2ForCausalLM:
    """Build a float64 model whose slots, width, segment and hidden size are all different numbers.

    Gate projections start at zero by design; here they are drawn at random so that the tests see them work.
    """
    torch.manual_seed(seed)
    sizes = {"num_slots": 5, "slot_dim": 12, "num_memory_heads": 3, "segment_length": SEGMENT, "retention": 0.7,
             "initial_output": 1.0}  # fmt: skip
    model = LM2ForCausalLM(LM2Config(base_config=base_config, **(sizes | options)))
    with torch.no_grad():
        for bank in model.banks:
            for gate in (bank.output_gate, bank.input_gate, bank.forget_gate, bank.forget_gate_bank):
                if gate is not None:
                    gate.weight.normal_()
            if bank.write_conv is not None:
                bank.write_conv.weight.normal_()
    return model.double().eval()


@functools.lru_cache
def case(name: str) -> LM2ForCausalLM:
    """Return the model of one of `CASES`."""
    base, flow, kind = name.split("-")
    extensions = EXTENSIONS if kind == "extended" else {}
    return lm2(BASES[base](), flow=flow, attention_span=None if kind == "full" else 9, **extensions)


def tokens(batch: int, width: int, seed: int = 0) -> torch.Tensor:
    """Draw token ids [batch, width] that are no special tokens."""
    return torch.randint(3, VOCABULARY, (batch, width), generator=torch.Generator().manual_seed(seed))
