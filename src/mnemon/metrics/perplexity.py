"""Perplexity of held-out text at several context lengths, all measured on the same tokens.

The text is cut into windows of the longest length, and every window into blocks of each shorter one; a block is read on
its own. The first token of a block has no predecessor there and is not predicted, so that a length of n predicts n - 1
tokens out of n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mnemon.data.background import load_background
from mnemon.data.text import TokenStream, encode_background
from mnemon.errors import ConfigError, DataError
from mnemon.metrics.intervals import Interval, bootstrap_mean, octaves

FACTORS = (1, 2, 4, 8)
"""Lengths that are measured unless others are asked for, as multiples of the trained length."""

_BATCH_TOKENS = 8192
_BATCH_LOGITS = 2**25


def held_out_windows(background: str, tokenizer: Any, lengths: Sequence[int], most: int) -> TokenStream:
    """Return the windows of the test split on which all lengths are measured.

    Args:
        background: a source for `mnemon.data.background.load_background`.
        tokenizer: a fast tokenizer with an end-of-text token.
        lengths: block lengths in tokens, at least 2, each a divisor of the longest.
        most: use at most so many windows of the longest length.

    Returns:
        At least two windows, from the beginning of the text on.

    Raises:
        ConfigError: a length does not divide the longest, or fewer than two windows are asked for.
        DataError: the text has fewer than two windows.
    """
    longest = max(lengths)
    for length in lengths:
        if length < 2 or longest % length:
            raise ConfigError(f"expected lengths of at least 2 that divide the longest ({longest}), got {length}")
    if most < 2:
        raise ConfigError(f"perplexity needs at least 2 samples for an interval, got {most}; ask for more")
    stream = encode_background(load_background(background, "test"), tokenizer)
    if len(stream) < 2 * longest:
        raise DataError(
            f"{background}: expected at least 2 windows of {longest} tokens of test text, got {len(stream)} tokens; "
            "use more text or shorter lengths"
        )
    return stream.windows(longest, most)


@torch.no_grad()
def token_losses(
    model: Any, ids: NDArray[Any], *, batch_tokens: int = _BATCH_TOKENS, **options: Any
) -> NDArray[np.float64]:
    """Return the cross entropy of every token given the ones before it in its block, in nats.

    Args:
        model: any causal language model, in evaluation mode.
        ids: token ids of the blocks, [N, T], T at least 2.
        batch_tokens: most tokens per call; a call has one block in any case, and fewer where the vocabulary is large.
        options: further arguments of the model's forward.

    Returns:
        [N, T - 1]; column t is the loss of token t + 1.
    """
    count, length = ids.shape
    rows = max(1, min(batch_tokens, _BATCH_LOGITS // model.config.vocab_size) // length)
    losses = np.empty((count, length - 1))
    for start in range(0, count, rows):
        block = torch.from_numpy(ids[start : start + rows].astype(np.int64)).to(model.device)
        logits = model(input_ids=block, use_cache=False, **options).logits[:, :-1].float()
        values = F.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="none")
        losses[start : start + rows] = values.view(len(block), -1).double().cpu().numpy()
    return losses


def perplexity_row(windows: TokenStream, length: int, losses: NDArray[np.float64]) -> dict[str, Any]:
    """Summarise one block length as one JSON value.

    Args:
        windows: the windows, [W, longest].
        length: tokens of a block.
        losses: of the windows cut into blocks, [W longest / length, length - 1].

    Returns:
        `length`; `samples`: windows; `tokens`: predicted tokens; `loss` in nats per token and `perplexity`, with the
        ends of their 95 % bootstrap interval over windows; `bits_per_byte` of text; `by_position`: mean loss of the
        tokens that have from `first` to `last` tokens before them in their block, in powers of two.
    """
    count = len(windows)
    loss = bootstrap_mean(losses.reshape(count, -1).mean(axis=1))
    num_bytes = windows.num_bytes.reshape(-1, length)[:, 1:].sum()
    by_position = losses.mean(axis=0)
    return {
        "length": length,
        "samples": count,
        "tokens": losses.size,
        "loss": asdict(loss),
        "perplexity": asdict(Interval(math.exp(loss.mean), math.exp(loss.low), math.exp(loss.high))),
        "bits_per_byte": float(losses.sum() / (math.log(2) * num_bytes)),
        "by_position": [
            {"first": first, "last": min(last, length - 1), "loss": float(by_position[first - 1 : last].mean())}
            for first, last in octaves(length - 1)
        ],
    }


def measure_perplexity(model: Any, windows: TokenStream, length: int, **options: Any) -> dict[str, Any]:
    """Measure one block length.

    Returns:
        `perplexity_row` of `token_losses`, and `loss_by_window`, for paired comparisons: nats per token of each window.
    """
    losses = token_losses(model, windows.ids.reshape(-1, length), **options)
    by_window = losses.reshape(len(windows), -1).mean(axis=1)
    return {**perplexity_row(windows, length, losses), "loss_by_window": by_window.tolist()}
