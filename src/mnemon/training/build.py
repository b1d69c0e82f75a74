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

from mnemon.data.tokenizer import background_training_texts, default_training_texts, train_tokenizer
from mnemon.errors import CheckpointError, ConfigError
from mnemon.models.names import resolve, shipped_checkpoints
from mnemon.training.data_sections import MqarData, TextData
from mnemon.training.recipe import ModelSection, Recipe


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast | None:
    """Return the recipe's tokenizer: read from `Recipe.tokenizer_source`, or trained on the training text.

    None for data without text.

    Raises:
        ConfigError: the tokenizer cannot be read or has no end-of-text token, or no pad token where the decoder is not
            a pretrained one (those pad with the end of text where they have nothing better).
    """
    if recipe.tokenizer is None:
        return None
    source = recipe.tokenizer_source
    if source is None:
        texts = default_training_texts(recipe.tokenizer.seed)
        if isinstance(recipe.data, TextData):
            texts = background_training_texts(recipe.data.background)
        return train_tokenizer(texts, recipe.tokenizer.vocab_size)
    try:
        place = resolve(source) if source == recipe.model.from_base else _checkpoint_folder(source)
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer in {source}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None and recipe.model.from_base is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {source} needs a pad and an end-of-text token")
    return tokenizer


def vocabulary_size(recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None) -> int:
    """Return the rows of the embedding.

    Args:
        recipe: of the run.
        tokenizer: of the run; None where there is none, or where it is not trained yet and the recipe's number counts.
    """
    if isinstance(recipe.data, MqarData):
        return recipe.data.vocab_size
    assert recipe.tokenizer is not None  # the recipe refuses text without one
    if tokenizer is None:
        return recipe.tokenizer.vocab_size
    return len(tokenizer) if recipe.tokenizer_source else max(recipe.tokenizer.vocab_size, len(tokenizer))


def build_model(recipe: Recipe, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None = None) -> PreTrainedModel:
    """Return the recipe's model, float32, with weights drawn from the recipe's seed or read from where it says.

    Args:
        recipe: of the run.
        vocab_size: rows of the embedding; a pretrained decoder has its own, and at least as many.
        tokenizer: gives the special token ids; None leaves 0 (pad), 1 (begin), 2 (end).

    Raises:
        ConfigError: the configuration is refused, or the tokenizer does not fit the pretrained decoder.
        CheckpointError: `init_from` does not fit, or `from_base` cannot be loaded.
    """
    section = recipe.model
    # Hugging Face draws from the global generator: lend it a seed, give it back
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if section.from_base is not None:
            return _pretrained_model(section, section.from_base, vocab_size)
        model = _new_model(section, build_config(section, vocab_size, tokenizer))
    if section.init_from is not None:
        load_weights(model, _checkpoint_folder(section.init_from))
    return model


def build_config(
    section: ModelSection, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> PreTrainedConfig:
    """Return the Hugging Face configuration of a new base with the tokenizer's vocabulary and special tokens.

    Raises:
        ConfigError: unknown model type or key, or a value the configuration refuses.
    """
    assert section.base is not None
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
    """Return the number of parameters: `total`, `active`, `trainable`, `embedding` (tied weights once), `memory`.

    Active are those that take part in the computation for one token: all but the memories that a router leaves out.
    Memory are LM2's banks, the layers of linear memories, or RMT's memory tokens and associative memories.
    """
    from mnemon.models.parameters import active_parameters, memory_parameters

    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "active": active_parameters(model),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "embedding": sum(weight.numel() for weight in model.get_input_embeddings().parameters()),
        "memory": memory_parameters(model),
    }


def base_fingerprint(model: PreTrainedModel) -> str | None:
    """Return the fingerprint of a frozen base as it was before training, None for any other model."""
    reference = getattr(model, "base_reference", None)
    return None if reference is None else str(reference.fingerprint)


def _new_model(section: ModelSection, config: PreTrainedConfig) -> PreTrainedModel:
    from mnemon.models.configuration_lm2 import LM2Config
    from mnemon.models.configuration_mom import MoMConfig
    from mnemon.models.configuration_rmt import RMTConfig
    from mnemon.models.registration import register

    register()
    if section.mom is not None:
        config = MoMConfig(base_config=config, **section.mom.model_dump())
    if section.lm2 is not None:
        config = LM2Config(base_config=config, **section.lm2.model_dump())
    if section.rmt is not None:
        config = RMTConfig(base_config=config, **section.rmt.model_dump())
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _pretrained_model(section: ModelSection, source: str, vocab_size: int) -> PreTrainedModel:
    """Return a pretrained decoder in float32, with a memory on it if the recipe wants one."""
    from mnemon.models.base_model import as_base, load_base
    from mnemon.models.modeling_lm2 import LM2ForCausalLM
    from mnemon.models.modeling_rmt import RMTForCausalLM
    from mnemon.models.registration import register

    register()  # so that an LM2 in the place of a plain decoder is known for what it is
    base = as_base(load_base(source, dtype=torch.float32))
    if base.config.vocab_size < vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, the decoder {source} knows {base.config.vocab_size}; leave out "
            "tokenizer.path to use the decoder's own"
        )
    if section.rmt is not None:
        return RMTForCausalLM.from_base(base, **section.rmt.model_dump())
    if section.lm2 is None:
        return base
    return LM2ForCausalLM.from_base(base, freeze_base=section.freeze_base, **section.lm2.model_dump())


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
