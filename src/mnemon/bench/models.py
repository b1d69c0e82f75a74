"""The competitors: a Hugging Face Llama as it is, and the same Llama with a memory."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mnemon.bench.cost import MemoryShape, ModelShape
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.modeling_lm2 import LM2ForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def llama_config(shape: ModelShape) -> LlamaConfig:
    """Return the configuration of the Llama that everything is measured on."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        bos_token_id=None,
        eos_token_id=None,
    )


def build_model(shape: ModelShape, memory: MemoryShape | None, device: str, dtype: str) -> PreTrainedModel:
    """Build a randomly initialised model in training mode; None = without a memory."""
    torch.manual_seed(0)
    config = llama_config(shape)
    model: PreTrainedModel
    if memory is None:
        model = LlamaForCausalLM(config)
    else:
        model = LM2ForCausalLM(
            LM2Config(
                base_config=config,
                num_slots=memory.num_slots,
                slot_dim=memory.slot_dim,
                num_memory_heads=memory.num_heads,
                segment_length=memory.segment_length,
                attention_span=memory.attention_span,
                flow=memory.flow,
            )
        )
    nn.Module.to(model, torch.device(device), DTYPES[dtype])
    return model.train()


def random_tokens(shape: ModelShape, batch_size: int, tokens: int, device: str) -> torch.Tensor:
    """Draw token ids [batch_size, tokens], always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocab_size, (batch_size, tokens), generator=generator).to(device)
