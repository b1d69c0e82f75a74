"""A model of ours, or any other that is loaded already, as the harness's language model.

The harness's own wrapper of Hugging Face models pads the rows of log-likelihood requests without an attention mask,
reads rolling windows unsorted, and generates with whatever its checkpoint's generation configuration says. None of it
is safe for a model with a memory, so this wrapper starts from the harness's `TemplateLM` (which turns texts into token
ids) and does the rest itself.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mnemon.errors import ConfigError, DataError
from mnemon.evaluation.controls import ModelSpec
from mnemon.evaluation.generation import continue_rows
from mnemon.evaluation.harness.likelihood import Request, continuation_scores
from mnemon.models.memory_model import MemoryModel

_NAMES_OF_LIMIT = ("max_position_embeddings", "n_positions", "n_ctx")
_ANY_LENGTH = 2**62


def longest_input(model: Any) -> int | None:
    """Give the most tokens a model says it can read at once; None for models with a memory, which read any number.

    Args:
        model: any causal language model.
    """
    if isinstance(model, MemoryModel):
        return None
    for name in _NAMES_OF_LIMIT:
        limit = getattr(model.config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of requests with a loaded model and its tokenizer.

    Args:
        spec: the model, its tokenizer and further arguments of its forward and `generate`.
        context_length: most tokens of a prompt with its answer; longer prompts lose their beginning, and are counted in
            `num_cut`. None = as many as the model reads.
        batch_size: most rows per call; None leaves it to the token budget alone.
        max_batch_tokens: most padded tokens per call; None chooses for the model.
        on_batch: called with the number of requests just done.

    Raises:
        ConfigError: without a tokenizer or its end-of-text token, or for a context the model cannot read.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        context_length: int | None = None,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        if spec.tokenizer is None:
            raise ConfigError(f"{spec.label} has no tokenizer, so it reads no text; use --suite mqar")
        if spec.tokenizer.eos_token_id is None:
            raise ConfigError(f"{spec.label}: the tokenizer names no end-of-sequence token; set tokenizer.eos_token")
        limit = longest_input(spec.model)
        if context_length is not None and limit is not None and context_length > limit:
            raise ConfigError(
                f"{spec.label} reads at most {limit} tokens, got --context-length {context_length}; "
                f"give {limit} or less"
            )
        self.tokenizer = spec.tokenizer
        self.context_length = context_length or limit
        self.num_cut = 0
        self._spec, self._batch_size, self._max_batch_tokens = spec, batch_size, max_batch_tokens
        self._on_batch = on_batch
        self._prefix: str = self.tokenizer.decode([self.prefix_token_id])
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token that stands before a text whose first token is predicted too."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text, with the tokenizer's own special tokens unless told otherwise or there."""
        if add_special_tokens is None:
            if string in self._encoded:
                return self._encoded[string]
            if string.startswith(self._prefix):
                add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def _encode_ahead(self, texts: Iterable[str]) -> None:
        plain = [text for text in texts if not text.startswith(self._prefix)]
        self._encoded = dict(zip(plain, self.tokenizer(plain)["input_ids"], strict=True)) if plain else {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations of contexts; all texts are turned into tokens in one call, and without a progress bar."""
        pairs = [request.args for request in requests]
        self._encode_ahead({context.rstrip() for context, _ in pairs} | {"".join(pair) for pair in pairs})
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, continuation in requests:
            if not continuation:
                raise DataError(f"the continuation {text!r} adds no token to its context, so it cannot be scored")
            pairs.append(self._within_context(context, continuation))
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, cut into windows of the context length that do not overlap."""
        pairs: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(
                tokens, self.prefix_token_id, min(self.context_length or _ANY_LENGTH, max(1, len(tokens))), 1
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((context, continuation))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._score(pairs), strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts greedily until one of their stop texts."""
        texts = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_generation_settings(request.args[1]), []).append(number)
        for (stop, new_tokens), members in groups.items():
            answers = continue_rows(
                self._spec.model,
                self.tokenizer,
                self._prompts([requests[number].args[0] for number in members], new_tokens),
                batch_size=self._batch_size,
                max_batch_tokens=self._max_batch_tokens,
                max_new_tokens=new_tokens,
                stop=stop,
                generate_kwargs=self._spec.generate_kwargs,
                on_batch=self._on_batch,
            )
            for number, text in zip(members, answers.texts, strict=True):
                texts[number] = text
        return texts

    def _prompts(self, texts: Sequence[str], new_tokens: int) -> list[list[int]]:
        """Return the ends of texts that leave room for the answer."""
        room = (self.context_length or _ANY_LENGTH) - new_tokens
        if room < 1:
            raise ConfigError(
                f"a context of {self.context_length} tokens has no room for a prompt beside {new_tokens} new tokens; "
                "raise --context-length"
            )
        self._encode_ahead(set(texts))
        rows = [self.tok_encode(text) or [self.prefix_token_id] for text in texts]
        self._encoded = {}
        self.num_cut += sum(len(row) > room for row in rows)
        return [row[-room:] for row in rows]

    def _within_context(self, context: list[int], continuation: list[int]) -> Request:
        """Drop the beginning of a context so that everything but the last token of the continuation fits."""
        length = self.context_length
        if length is None or len(context) + len(continuation) - 1 <= length:
            return context, continuation
        room = length + 1 - len(continuation)
        if room < 1:
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens does not fit into a context of {length}; "
                "raise --context-length"
            )
        self.num_cut += 1
        return context[-room:], continuation

    def _score(self, pairs: Sequence[Request]) -> list[tuple[float, bool]]:
        return continuation_scores(
            self._spec.model,
            pairs,
            batch_size=self._batch_size,
            max_batch_tokens=self._max_batch_tokens,
            options=self._spec.generate_kwargs,
            on_batch=self._on_batch,
        )


def _generation_settings(options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Return the stop texts and the most new tokens of a request; everything is decoded greedily."""
    if options.get("do_sample"):
        raise ConfigError("this task samples its answers, which mnemon does not; choose another task")
    until = options.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(until)
    return tuple(text for text in stop if text), int(options.get("max_gen_toks", 256))
