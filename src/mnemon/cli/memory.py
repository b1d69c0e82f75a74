"""What the commands that use memory files share: is there a memory at all, and does the file fit the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.errors import ConfigError, DataError, StateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mnemon.models.memory_model import MemoryModel
    from mnemon.models.state import MemoryState

MemoryOption = Annotated[
    Path | None,
    typer.Option("--memory", help="Go on from the memory in this file (see `mnemon memorize`)."),
]


def as_memory_model(model: Any, name: str) -> "MemoryModel":
    """Return the model if it has a memory.

    Raises:
        ConfigError: it has none.
    """
    from mnemon.models.memory_model import MemoryModel

    if not isinstance(model, MemoryModel) or getattr(model.config, "memory_layers", None) == []:
        raise ConfigError(f"{name}: has no memory; choose an LM2, MoM or RMT model, or put a memory on this one")
    return model


def read_memory(path: Path, model: "MemoryModel", tokenizer: "PreTrainedTokenizerBase") -> "MemoryState":
    """Read a memory of one text that fits a model and its tokenizer, and put it where the model is.

    Raises:
        DataError: the file is missing, damaged or of a newer version, or it holds several texts.
        StateError: the memory is of another model or tokenizer; the file is named.
    """
    from mnemon.models.memory_file import check_tokenizer, load_memory

    state = load_memory(path, model.device)
    if state.batch_size != 1:
        raise DataError(f"{path}: holds {state.batch_size} memories side by side; choose one with .select() and save it")
    try:
        state = model.adopt(state, 1, weights=True)
        check_tokenizer(state, tokenizer)
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    return state
