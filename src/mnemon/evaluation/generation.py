"""Batched, cached, greedy answers from any Hugging Face causal language model.

One prefill over [B, T] left-padded prompts and a few decoding steps, through the model's own `generate`, so that LM2
and plain models take exactly the same path. Batches are formed by token budgets. For a model that attends to everything
the attention masks of padded rows run out first, B x T x T. One of bounded state holds activations of a segment alone,
so that rows are what matters, however long they are.
"""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from mnemon.errors import ConfigError, DataError
from mnemon.models.memory_model import MemoryModel

_FULL_ATTENTION_CPU = 2048
_FULL_ATTENTION_GPU = 65536
_AT_ONCE = 16384
_TEXT = 2**23  # token ids and mask of a call take 16 bytes per token


@dataclass(frozen=True)
class BatchLimits:
    """How much of a batch is read in one call.

    Attributes:
        tokens: most padded tokens per call.
        at_once: most tokens that the model works on at the same time.
        call_length: tokens per row that it works on at the same time; None = all of them.
    """

    tokens: int
    at_once: int
    call_length: int | None = None

    def hold(self, rows: int, longest: int) -> bool:
        """Say whether so many rows of so many tokens are within them."""
        at_once = longest if self.call_length is None else min(longest, self.call_length)
        return rows * longest <= self.tokens and rows * at_once <= self.at_once


@dataclass(frozen=True)
class Answers:
    """Generated texts in the order of the prompts, and what they cost.

    Attributes:
        texts: one per prompt.
        seconds: wall time of the model's calls.
        prompt_lengths: tokens of every prompt, padding not counted.
        new_lengths: tokens generated for every prompt.
    """

    texts: list[str]
    seconds: float
    prompt_lengths: list[int]
    new_lengths: list[int]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(self.prompt_lengths)

    @property
    def new_tokens(self) -> int:
        """Tokens generated for all prompts together."""
        return sum(self.new_lengths)

    def part(self, start: int, stop: int) -> "Answers":
        """Return the answers to prompts start ... stop - 1, with their share of the time by tokens."""
        prompts, new = self.prompt_lengths[start:stop], self.new_lengths[start:stop]
        share = (sum(prompts) + sum(new)) / (self.prompt_tokens + self.new_tokens)
        return Answers(self.texts[start:stop], self.seconds * share, prompts, new)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    max_new_tokens: int = 20,
    generate_kwargs: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Answers:
    """Continue every prompt greedily until the end-of-sequence token or `max_new_tokens`.

    Args:
        model: any causal language model with Hugging Face's `generate`.
        tokenizer: its tokenizer; needs an end-of-sequence or padding token.
        prompts: texts, none of them empty.
        batch_size: most prompts per call; None leaves it to the token budget alone.
        max_batch_tokens: most padded prompt tokens per call; a single longer prompt still runs, alone. None chooses by
            `batch_limits`.
        max_new_tokens: longest answer in tokens.
        generate_kwargs: further arguments for `model.generate`, for example `knock_out_memory=True`.
        on_batch: called with the number of prompts just finished.

    Returns:
        The texts without special tokens, in the order of the prompts, with seconds and token counts.

    Raises:
        ConfigError: if a number is out of range, or the model cannot read so many tokens.
        DataError: if a prompt has no token.
    """
    rows = [list(ids) for ids in tokenizer(list(prompts))["input_ids"]] if prompts else []
    for index, row in enumerate(rows):
        if not row:
            raise DataError(f"prompt {index} has no token; an empty prompt cannot be answered")
    return continue_rows(
        model,
        tokenizer,
        rows,
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        max_new_tokens=max_new_tokens,
        generate_kwargs=generate_kwargs,
        on_batch=on_batch,
    )


@torch.no_grad()
def continue_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    *,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    max_new_tokens: int = 20,
    stop: Sequence[str] = (),
    generate_kwargs: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Answers:
    """Continue every row of token ids greedily until the end-of-sequence token, a stop text or `max_new_tokens`.

    Args:
        model: any causal language model with Hugging Face's `generate`.
        tokenizer: its tokenizer; needs an end-of-sequence or padding token.
        rows: prompts as token ids, none of them empty.
        batch_size: most prompts per call; None leaves it to the token budget alone.
        max_batch_tokens: most padded prompt tokens per call; None chooses by `batch_limits`.
        max_new_tokens: longest answer in tokens.
        stop: texts that end an answer; neither they nor what follows them belong to it.
        generate_kwargs: further arguments for `model.generate`.
        on_batch: called with the number of prompts just finished.

    Returns:
        The texts without special tokens, in the order of the prompts, with seconds and token counts.

    Raises:
        ConfigError: if a number is out of range, or the model cannot read so many tokens.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("max_batch_tokens", max_batch_tokens),
        ("max_new_tokens", max_new_tokens),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    config = _greedy_config(model, tokenizer, max_new_tokens)
    limits = batch_limits(model, max_batch_tokens)
    texts, new_lengths, seconds = [""] * len(rows), [0] * len(rows), 0.0
    with _evaluating(model, config):
        for batch in plan_batches([len(row) for row in rows], batch_size=batch_size, limits=limits):
            width = max(len(rows[i]) for i in batch)
            arguments = dict(generate_kwargs or {})
            if stop:
                arguments["stopping_criteria"] = StoppingCriteriaList([_StopAtText(tokenizer, stop, width)])
            started = time.perf_counter()
            new_rows = _generate_batch(model, [rows[i] for i in batch], config, arguments)
            seconds += time.perf_counter() - started
            for index, new_row in zip(batch, new_rows, strict=True):
                texts[index] = _before(tokenizer.decode(new_row, skip_special_tokens=True), stop)
                new_lengths[index] = len(new_row)
            if on_batch is not None:
                on_batch(len(batch))
    return Answers(texts, seconds, [len(row) for row in rows], new_lengths)


class _StopAtText(StoppingCriteria):
    """Ends a row once its new tokens spell one of the stop texts, however they are cut into tokens."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_width: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, tuple(stop), prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        done = [any(text in written for text in self._stop) for written in texts]
        return torch.tensor(done, device=input_ids.device)


def _before(text: str, stop: Sequence[str]) -> str:
    ends = [place for place in (text.find(word) for word in stop) if place >= 0]
    return text[: min(ends)] if ends else text


def accepts(model: Any, argument: str) -> bool:
    """Tell whether a model's forward takes an argument by name."""
    return argument in inspect.signature(model.forward).parameters


def batch_limits(model: Any, max_batch_tokens: int | None = None) -> BatchLimits:
    """Choose how much to read per call.

    A model of bounded state gains from many rows, however long they are: it works on one segment of each at a time.
    One that attends to everything does not on a CPU: padded rows need an explicit mask there, which is slower than
    prompts read alone (measured with a decoder of width 96 at 4k tokens: 9,900 tokens/s alone, 3,800 in batches of 8).

    Args:
        model: any causal language model.
        max_batch_tokens: most padded tokens per call, for whoever knows better.
    """
    if max_batch_tokens is not None:
        return BatchLimits(max_batch_tokens, max_batch_tokens)
    if isinstance(model, MemoryModel) and model.has_bounded_state:
        return BatchLimits(_TEXT, _AT_ONCE, model.call_length)
    tokens = _FULL_ATTENTION_CPU if model.device.type == "cpu" else _FULL_ATTENTION_GPU
    return BatchLimits(tokens, tokens)


def plan_batches(lengths: Sequence[int], *, batch_size: int | None, limits: BatchLimits) -> list[list[int]]:
    """Group prompts so that batches stay within limits, similar lengths together.

    Args:
        lengths: tokens per prompt.
        batch_size: most prompts per batch; None for no limit but the others.
        limits: most tokens per batch; a longer single prompt gets a batch of its own.

    Returns:
        Lists of prompt indices that hold every index once, longest prompts first (a batch that does not fit into memory
        then fails at once and not after an hour).
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        grown = len(batches[-1]) + 1 if batches else 0
        if batches and grown <= (batch_size or grown) and limits.hold(grown, lengths[batches[-1][0]]):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@contextlib.contextmanager
def _evaluating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Put a model into evaluation mode with no generation defaults but ours, and put everything back afterwards.

    Hugging Face fills every unset generation option from the model's own configuration, so a repetition penalty stored
    with a checkpoint would otherwise change what we call greedy.
    """
    was_training, stored = model.training, getattr(model, "generation_config", None)
    model.eval()
    if stored is not None:
        model.generation_config = config
    try:
        yield
    finally:
        model.train(was_training)
        if stored is not None:
            model.generation_config = stored


def _generate_batch(
    model: Any, rows: list[list[int]], config: GenerationConfig, generate_kwargs: Mapping[str, Any]
) -> list[list[int]]:
    width = max(map(len, rows))
    pad = int(config.pad_token_id)
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    try:
        output = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config, **generate_kwargs
        )
    except IndexError as error:
        raise ConfigError(
            f"the model cannot read prompts of {width} tokens (its table of positions or tokens ends before: {error}); "
            "choose shorter lengths"
        ) from error
    return [_until_stop(row, config) for row in output[:, width:].tolist()]


def _until_stop(row: list[int], config: GenerationConfig) -> list[int]:
    for position, token in enumerate(row):
        if token in config.eos_token_id:
            return row[:position]
    return row


def _greedy_config(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Describe greedy decoding; stop at the end tokens of tokenizer and checkpoint (chat models have several)."""
    stops: set[int] = set()
    for owner in (tokenizer, getattr(model, "generation_config", None)):
        ids = getattr(owner, "eos_token_id", None)
        stops.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    if not stops:
        raise ConfigError("the tokenizer names no end-of-sequence token; set tokenizer.eos_token")
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=min(stops) if pad is None else pad,
    )
