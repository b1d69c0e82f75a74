"""Training of the small byte-level BPE tokenizer that the tiny recipes use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mnemon.data.babi import GENERATED_TASKS, Question, Story, generate
from mnemon.data.babi.solver import COUNT_WORDS
from mnemon.data.background import load_background
from mnemon.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
BYTE_VALUES = 256
BACKGROUND_CHARACTERS = 600_000
TEXT_CHARACTERS = 20_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text goes through it and back unchanged.

    Every digit is a token of its own; padding is on the left; no token is added around a text.

    Args:
        texts: training texts, consumed once.
        vocab_size: number of tokens including `<pad>` (0), `<bos>` (1), `<eos>` (2) and the 256 bytes.

    Returns:
        A tokenizer that saves and loads as any Hugging Face tokenizer. The same texts give the same bytes.

    Raises:
        ConfigError: `vocab_size` is too small to hold the special tokens and the bytes.
    """
    smallest = BYTE_VALUES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(f"expected a vocabulary of at least {smallest} tokens, got {vocab_size}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def background_training_texts(background: str) -> Iterator[str]:
    """Yield the training split of a background, sentence by sentence: what a tokenizer for that text is trained on.

    Args:
        background: a source for `load_background`. Of a long one the first `TEXT_CHARACTERS` characters are enough.
    """
    characters = 0
    for document in load_background(background, "train").documents:
        for sentence in document.sentences:
            if characters >= TEXT_CHARACTERS:
                return
            characters += len(sentence)
            yield f" {sentence}"


def default_training_texts(seed: int = 0, stories_per_task: int = 300) -> Iterator[str]:
    """Yield the texts of the shipped tokenizer: training-split prose of the standard library and generated stories.

    The stories are frequent enough for every word of qa1-qa10 to become one token.

    Args:
        seed: seed of the generated stories.
        stories_per_task: how many stories of each task.
    """
    characters = 0
    for document in load_background("stdlib", "train").documents:
        for sentence in document.sentences:
            if characters < BACKGROUND_CHARACTERS:
                characters += len(sentence)
                yield f" {sentence}"
    for task in GENERATED_TASKS:
        for story in generate(task, stories_per_task, seed):
            yield _as_prompt(story)

    rare = (*COUNT_WORDS, "nothing", "maybe")  # too rare in the stories themselves to be sure of a token
    yield from (f"\nAnswer: {word}" for word in rare for _ in range(stories_per_task))


def _as_prompt(story: Story) -> str:
    facts = "".join(f" {statement.text}" for statement in story.statements)
    asked = "".join(_as_question(question) for question in story.questions)
    return f"<context>\n{facts}\n</context>{asked}"


def _as_question(question: Question) -> str:
    return f"\n\nQuestion: {question.text}\nAnswer: {question.answer}"
