"""Tiny configurations of the decoder families a memory is grafted on, all of width 32 with 50 tokens."""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCABULARY = 50
WINDOW = 5
LEARNED_POSITIONS = 48


def _sizes(**changes: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return sizes | changes


def family(name: str) -> PreTrainedConfig:
    """Return a fresh configuration of one of `FAMILIES`."""
    alternating = ["sliding_attention", "full_attention"] * 2
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    match name:
        case "llama":
            return LlamaConfig(**_sizes())
        case "qwen2":
            return Qwen2Config(**_sizes())
        case "qwen3":
            return Qwen3Config(**_sizes(head_dim=8))
        case "mistral":
            return MistralConfig(**_sizes(sliding_window=None))
        case "mistral-window":
            return MistralConfig(**_sizes(sliding_window=WINDOW))
        case "smollm3":
            return SmolLM3Config(**_sizes(no_rope_layers=[1, 1, 1, 0]))
        case "olmo2":
            return Olmo2Config(**_sizes())
        case "gemma2":
            return Gemma2Config(
                **_sizes(head_dim=8, sliding_window=WINDOW, layer_types=alternating, attn_logit_softcapping=None)
            )
        case "gemma3":
            return Gemma3TextConfig(**_sizes(head_dim=8, sliding_window=WINDOW, layer_types=alternating))
        case "gpt_neox":
            sizes = _sizes(rotary_pct=0.25)
            del sizes["num_key_value_heads"]
            return GPTNeoXConfig(**sizes)
        case "gpt2":
            return GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=LEARNED_POSITIONS,
                initializer_range=0.2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **special,
            )  # fmt: skip
        case "lfm2":
            return Lfm2Config(**_sizes(block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * 2))
    raise ValueError(name)


FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "mistral-window", "smollm3", "olmo2", "gemma2", "gemma3", "gpt_neox", "gpt2",
    "lfm2",
)  # fmt: skip
