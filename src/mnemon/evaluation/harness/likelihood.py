"""Log-likelihoods of continuations, batched so that padding changes nothing.

Requests are sorted and batched by length and padded on the right; rows that are shorter than their batch are told apart
by an attention mask. That matters here: a memory that read padding would remember it. Requests that share all but their
last token (the choices "A" to "D" of one question) are read once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mnemon.errors import ConfigError
from mnemon.evaluation.generation import accepts, batch_limits, plan_batches

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of its continuation, at least one."""

_BATCH_LOGITS = 2**25


@torch.no_grad()
def continuation_scores(
    model: Any,
    requests: Sequence[Request],
    *,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    options: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
    """Score continuations: the sum over their tokens of log p(token | context and earlier tokens).

    Args:
        model: any causal language model, in evaluation mode.
        requests: contexts and continuations as token ids.
        batch_size: most rows per call; None leaves it to the token budget alone.
        max_batch_tokens: most padded tokens per call; a single longer row still runs, alone. None chooses by
            `batch_limits`.
        options: further arguments of the model's forward, for example `knock_out_memory=True`.
        on_batch: called with the number of requests just scored.

    Returns:
        Per request, in the order given, the log-likelihood in nats and whether every token of the continuation is the
        likeliest one. The result does not depend on how requests are batched, up to the rounding of the model's dtype.

    Raises:
        ConfigError: if a number is out of range, or the model cannot read so many tokens.
    """
    for name, value in (("batch_size", batch_size), ("max_batch_tokens", max_batch_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(requests):
        sharing.setdefault((*context, *continuation[:-1]), []).append(index)
    rows = list(sharing)
    scores = [(0.0, False)] * len(requests)
    limits = batch_limits(model, max_batch_tokens)
    for batch in plan_batches([len(row) for row in rows], batch_size=batch_size, limits=limits):
        asked = [[(index, *requests[index]) for index in sharing[rows[number]]] for number in batch]
        for first, last in _within_memory(model, [len(rows[number]) for number in batch], asked):
            chosen = [rows[number] for number in batch[first:last]]
            found = _score_batch(model, chosen, asked[first:last], options or {})
            for index, score in found:
                scores[index] = score
            if on_batch is not None:
                on_batch(len(found))
    return scores


_Asked = list[tuple[int, Sequence[int], Sequence[int]]]


def _within_memory(model: Any, lengths: Sequence[int], asked: Sequence[_Asked]) -> list[tuple[int, int]]:
    """Cut a batch into ranges of rows whose logits stay within bounds."""
    per_row = _columns_kept(lengths, asked) * int(model.config.vocab_size)
    rows = max(1, _BATCH_LOGITS // per_row)
    return [(start, min(start + rows, len(lengths))) for start in range(0, len(lengths), rows)]


def _columns_kept(lengths: Sequence[int], asked: Sequence[_Asked]) -> int:
    """Give how many of the last columns of a batch hold all positions that are asked for."""
    return max(lengths) - min(len(context) - 1 for row in asked for _, context, _ in row)


def _score_batch(
    model: Any, rows: Sequence[tuple[int, ...]], asked: Sequence[_Asked], options: Mapping[str, Any]
) -> list[tuple[int, tuple[float, bool]]]:
    lengths = [len(row) for row in rows]
    width, keep = max(lengths), _columns_kept(lengths, asked)
    logits = _read(model, rows, width, keep, options)
    at_row: list[int] = []
    at_column: list[int] = []
    tokens: list[int] = []
    sizes, indices = [], []
    for number, row in enumerate(asked):
        for index, context, continuation in row:
            start = len(context) - 1 - (width - keep)
            at_row += [number] * len(continuation)
            at_column += range(start, start + len(continuation))
            tokens += continuation
            sizes.append(len(continuation))
            indices.append(index)
    picked = logits[torch.tensor(at_row, device=logits.device), torch.tensor(at_column, device=logits.device)]
    wanted = torch.tensor(tokens, device=logits.device)
    wide = picked if picked.dtype == torch.float64 else picked.float()
    log_p = wide.gather(-1, wanted[:, None]).squeeze(-1) - wide.logsumexp(-1)
    likeliest = picked.argmax(-1) == wanted
    sums = [float(part.sum()) for part in log_p.double().cpu().split(sizes)]
    greedy = [bool(part.all()) for part in likeliest.cpu().split(sizes)]
    return list(zip(indices, zip(sums, greedy, strict=True), strict=True))


def _read(model: Any, rows: Sequence[tuple[int, ...]], width: int, keep: int, options: Mapping[str, Any]) -> Tensor:
    """Give the logits of the last `keep` columns, [rows, keep, vocabulary]."""
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    arguments: dict[str, Any] = {"use_cache": False, **options}
    if min(len(row) for row in rows) < width:
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        arguments["attention_mask"] = torch.tensor(mask, device=model.device)
    if accepts(model, "logits_to_keep"):
        arguments["logits_to_keep"] = keep
    try:
        logits: Tensor = model(input_ids=ids, **arguments).logits
    except IndexError as error:
        raise ConfigError(
            f"the model cannot read {width} tokens (its table of positions or tokens ends before: {error}); "
            "give a shorter --context-length"
        ) from error
    return logits[:, -keep:]
