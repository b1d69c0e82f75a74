"""What can be recorded: a text, a BABILong sample, or a prompt for a memory that was made before."""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mnemon.data.babilong import generate
from mnemon.data.encoding import evaluation_prompt
from mnemon.data.sample import Sample
from mnemon.errors import ConfigError, DataError
from mnemon.inspection.trace import Source
from mnemon.models.state import MemoryState


@dataclass(frozen=True)
class Reader:
    """What a model is to read, and what is asked; the arguments of `mnemon.inspection.record.record`.

    Attributes:
        ids: token ids of the text.
        source: what it is.
        target: token ids of the right answer, which follows the text; None = nothing is asked.
        question_start: number of the question's first token, if there is a question.
        state: what the model has read before.
    """

    ids: tuple[int, ...]
    source: Source
    target: tuple[int, ...] | None = None
    question_start: int | None = None
    state: MemoryState | None = None


def text_source(text: str, name: str, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Return a text to read.

    Args:
        text: the text.
        name: its name, such as that of its file.
        tokenizer: the model's tokenizer.

    Raises:
        DataError: the text holds no token.
    """
    return Reader(_encoded(text, name, tokenizer), Source("text", name))


def memory_source(state: MemoryState, name: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Return a prompt to read after what a memory holds.

    It is no beginning of a text, so it gets no token that marks one.

    Args:
        state: the memory.
        name: its name, such as that of its file.
        prompt: what is asked of it.
        tokenizer: the model's tokenizer.

    Raises:
        DataError: the prompt holds no token.
    """
    ids = _encoded(prompt, "the prompt", tokenizer, is_beginning=False)
    return Reader(ids, Source("memory", name, question=prompt), question_start=0, state=state)


def babilong_source(name: str, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Return a BABILong sample by name.

    Args:
        name: task, length and seed, such as "qa2:4k:0".
        tokenizer: the model's tokenizer, which counts the tokens.

    Raises:
        ConfigError: for a name of another form, an unknown task, or a length the task does not fit into.
    """
    found = re.fullmatch(r"([^:]+):([^:]+):(\d+)", name)
    if found is None:
        raise ConfigError(f"expected a sample as TASK:LENGTH:SEED, such as qa2:4k:0, got {name!r}")
    task, length, seed = found.groups()
    (sample,) = generate(task, length, 1, tokenizer, seed=int(seed))
    return sample_source(sample, name, tokenizer)


def sample_source(sample: Sample, name: str, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Return a BABILong sample in the short layout, with its right answer as the target.

    Args:
        sample: the sample.
        name: its name.
        tokenizer: the model's tokenizer.
    """
    prompt = evaluation_prompt(sample)
    before_question = prompt[: prompt.rindex("Question:")].rstrip()
    # Tokens may reach over the border, so the question begins where both texts no longer agree.
    ids, shorter = (tuple(tokenizer(text)["input_ids"]) for text in (prompt, before_question))
    start = next((i for i, (one, two) in enumerate(zip(ids, shorter, strict=False)) if one != two), len(shorter))
    answer = tuple(tokenizer(f" {sample.target}", add_special_tokens=False)["input_ids"])
    return Reader(ids, Source("babilong", name, sample.question, sample.target), answer, start)


def _encoded(text: str, name: str, tokenizer: PreTrainedTokenizerBase, is_beginning: bool = True) -> tuple[int, ...]:
    ids = tuple(tokenizer(text, add_special_tokens=is_beginning)["input_ids"]) if text else ()
    if not ids:
        raise DataError(f"{name}: is empty; expected a text of at least one token")
    return ids
