"""From a recipe to the things a run needs: tokenizer and model with seeded weights, and their parameter counts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mnemon.data.tokenizer import default_training_texts, train_tokenizer
from mnemon.errors import CheckpointError, ConfigError
from mnemon.models.loading import shipped_checkpoints
from mnemon.training.recipe import ModelSection, Recipe


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return the recipe's tokenizer: of `model.init_from`, of `tokenizer.path`, or trained on the training text.

    Raises:
        ConfigError: the tokenizer cannot be read or has no pad or end-of-text token.
    """
    source = recipe.tokenizer.path or recipe.model.init_from
    if source is None:
        texts = default_training_texts(recipe.tokenizer.seed)
        return train_tokenizer(texts, recipe.tokenizer.vocab_size)
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(_checkpoint_folder(source))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer in {source}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {source} needs a pad and an end-of-text token")
    return tokenizer


def build_model(recipe: Recipe, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None = None) -> PreTrainedModel:
    """Return the recipe's model, float32, with weights drawn from the recipe's seed or read from `init_from`.

    Args:
        recipe: of the run.
        vocab_size: rows of the embedding.
        tokenizer: gives the special token ids; None leaves 0 (pad), 1 (begin), 2 (end).

    Raises:
        ConfigError: the configuration is refused; CheckpointError: `init_from` does not fit.
    """
    config = build_config(recipe.model, vocab_size, tokenizer)
    with torch.random.fork_rng(
        devices=[]
    ):  # Hugging Face draws from the global generator: lend it a seed, give it back
        torch.manual_seed(recipe.seed)
        model = _new_model(recipe.model, config)
    if recipe.model.init_from is not None:
        load_weights(model, _checkpoint_folder(recipe.model.init_from))
    return model


def build_config(
    section: ModelSection, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> PreTrainedConfig:
    """Return the Hugging Face configuration of the base with the tokenizer's vocabulary and special tokens.

    Raises:
        ConfigError: unknown model type or key, or a value the configuration refuses.
    """
    keys = dict(section.base)
    model_type = keys.pop("model_type")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if tokenizer is not None:
        special = {name: getattr(tokenizer, name) for name in special}
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:
        raise ConfigError(
            f"model.base.model_type: Hugging Face has no {model_type!r}{_near(model_type, list(_model_types()))}"
        ) from None
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {})) | {"rope_theta"}
    for key in keys:
        if key not in known:
            raise ConfigError(f"unknown key model.base.{key} for {model_type}{_near(key, sorted(known))}")
        if key == "vocab_size" or key in special:
            raise ConfigError(f"model.base.{key} comes from the tokenizer; remove it")
    try:
        return AutoConfig.for_model(model_type, **keys, vocab_size=vocab_size, **special)
    except Exception as error:  # strict configurations raise their own types
        raise ConfigError(f"model.base: {model_type} refuses it: {_last_line(error)}") from None


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the tensors of a checkpoint folder into a model.

    Raises:
        CheckpointError: unreadable, or tensors missing, extra or of another shape (named).
    """
    tensors: dict[str, torch.Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file")
    for file in files:
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    wanted = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(set(wanted) - set(tensors) - tied)
    extra = sorted(set(tensors) - set(wanted))
    wrong = sorted(name for name in set(wanted) & set(tensors) if wanted[name].shape != tensors[name].shape)
    for what, names in (("missing", missing), ("extra", extra), ("mis-shaped", wrong)):
        if names:
            raise CheckpointError(f"{folder} does not fit the recipe's model: {what} tensors {', '.join(names[:5])}")
    model.load_state_dict(tensors, strict=False)  # tied tensors share storage with one that is there


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of parameters: `total`, `embedding` (tied weights once) and `memory` (the banks')."""
    memory = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] == "memory")
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "embedding": sum(weight.numel() for weight in model.get_input_embeddings().parameters()),
        "memory": memory,
    }


def _new_model(section: ModelSection, config: PreTrainedConfig) -> PreTrainedModel:
    if section.lm2 is None:
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return plain
    from mnemon.models.configuration_lm2 import LM2Config
    from mnemon.models.modeling_lm2 import LM2ForCausalLM

    return LM2ForCausalLM(LM2Config(base_config=config, **section.lm2.model_dump()))


def _checkpoint_folder(source: str) -> Path:
    """Return the folder of a checkpoint given as a path or a shipped name."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    shipped = shipped_checkpoints()
    if source not in shipped:
        raise ConfigError(f"{source} is neither a folder nor a shipped checkpoint ({', '.join(shipped) or 'none'})")
    return shipped[source]


def _model_types() -> Iterator[str]:
    yield from CONFIG_MAPPING


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
