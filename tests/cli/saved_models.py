"""Random models in folders, as the commands find them on a user's disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from mnemon.data.tokenizer import train_tokenizer

TEXT = "Mary went to the garden. John took the milk to the office."


def tiny_tokenizer(*texts: str) -> PreTrainedTokenizerBase:
    """Train a tokenizer of 300 tokens on a few sentences."""
    return train_tokenizer(texts or [TEXT], 300)


def tiny_llama(tokenizer: PreTrainedTokenizerBase, **options: Any) -> LlamaConfig:
    """Describe a Llama of two blocks of width 32 for a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(vocab_size=len(tokenizer), **(sizes | special | options))


def save_models(
    root: Path, tokenizer: PreTrainedTokenizerBase, built: Mapping[str, Callable[[], PreTrainedModel]]
) -> dict[str, str]:
    """Build models, each with weights of its own, and save them with the tokenizer; return their folders by name."""
    folders = {}
    for seed, (name, build) in enumerate(built.items()):
        torch.manual_seed(seed)
        folders[name] = str(root / name)
        build().save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders
