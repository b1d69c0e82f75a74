"""Load a model and its tokenizer by name: a folder with a model or an adapter, a shipped checkpoint, or a hub name."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mnemon.errors import CheckpointError, MnemonError
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.names import is_adapter, resolve, shipped_checkpoints
from mnemon.models.registration import register
from mnemon.models.weight_files import check_model_folder

__all__ = ["load_model", "resolve", "shipped_checkpoints"]


def load_model(
    name: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode, and its tokenizer (padding on the left, as generation needs).

    An adapter is put on the base it names. Its tokenizer is the one in its own folder, or else the base's.

    Args:
        name: a local folder, a shipped checkpoint's name, or a hub name.
        dtype: dtype to load into; None = the checkpoint's. The base of an adapter is checked in the dtype that the
            adapter was made with, and converted afterwards.
        device: where to put the model.
    Raises:
        CheckpointError: if files are missing or damaged, or tensors are missing, extra or mis-shaped (named).
    """
    register()
    source = resolve(name)
    try:
        if is_adapter(source):
            model, tokenizer = _load_adapter(Path(source), dtype)
        else:
            if Path(source).is_dir():
                check_model_folder(Path(source))
            options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
            model = AutoModelForCausalLM.from_pretrained(source, **options)
            tokenizer = AutoTokenizer.from_pretrained(source)
    except MnemonError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"cannot load {name}: {first}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.to(device).eval(), tokenizer


def _load_adapter(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    model: Any = LM2ForCausalLM.from_adapter(folder)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(folder) if own else model.base.name_or_path)
    return (model if dtype is None else model.to(dtype)), tokenizer
