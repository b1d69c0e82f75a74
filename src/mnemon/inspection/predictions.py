"""How well a text is predicted with the memory and without it, token by token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mnemon.inspection.reading import Reading, Segment
from mnemon.inspection.trace import Floats, Integers
from mnemon.models.memory_model import MemoryModel
from mnemon.models.state import MemoryCache, MemoryState


class NextTokens:
    """Takes the logits of a reading segment by segment; of earlier segments only the last row is kept.

    Args:
        reading: what is read.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.log_probabilities: Floats = np.full(reading.num_tokens, np.nan, dtype=np.float32)
        self.likeliest: Integers = np.zeros(reading.num_columns, dtype=np.int64)
        self._last: Tensor | None = None

    def take(self, segment: Segment, logits: Tensor) -> None:
        """Take the logits [its tokens, vocabulary] of the next segment."""
        tokens, columns = segment.tokens, segment.columns
        before = logits[:-1] if self._last is None else torch.cat([self._last, logits[:-1]])
        first = tokens.stop - len(before)
        self.log_probabilities[first : tokens.stop] = target_log_probabilities(
            before, self.reading.ids[first : tokens.stop]
        )
        ends = self.reading.starts[columns.start + 1 : columns.stop + 1] - 1 - tokens.start
        rows = logits[torch.from_numpy(ends.astype(np.int64)).to(logits.device)]
        self.likeliest[columns.start : columns.stop] = rows.argmax(dim=-1).cpu().numpy()
        self._last = logits[-1:].clone()

    def column_means(self) -> Floats:
        """Return the mean log-probability of every column's tokens, as far as something precedes them, [N]."""
        starts = self.reading.starts[:-1]
        known = ~np.isnan(self.log_probabilities)
        sums = np.add.reduceat(np.where(known, self.log_probabilities, 0).astype(np.float64), starts)
        counts = np.add.reduceat(known.astype(np.int64), starts)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)

    def words(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Return the likeliest next token after every column, as text."""
        texts: dict[int, str] = {}
        for index in self.likeliest.tolist():
            if index not in texts:
                texts[index] = str(tokenizer.decode([index]))
        return tuple(texts[index] for index in self.likeliest.tolist())


@torch.no_grad()
def greedy_answer(
    model: MemoryModel, ids: Sequence[int], state: MemoryState | None, end: int | None, most: int
) -> list[int]:
    """Return what a model says after a prompt, its likeliest token each time.

    Args:
        model: the model, in evaluation mode.
        ids: token ids of the prompt, at least one.
        state: what was read before; None = nothing. It is not changed.
        end: token that ends the answer, and is no part of it; None = only its length does.
        most: longest answer in tokens.
    """
    cache, answer, given = MemoryCache(None if state is None else state.branch()), list[int](), list(ids)
    while len(answer) < most:
        inputs = torch.tensor([given], device=model.device)
        token = int(model(input_ids=inputs, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())
        if token == end:
            break
        answer.append(token)
        given = [token]
    return answer


def target_log_probabilities(logits: Tensor, targets: Any) -> Floats:
    """Return the natural log-probability of each target [n] under its logits [n, V], in float32 at least."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    chosen = torch.as_tensor(targets, dtype=torch.int64, device=logits.device)[:, None]
    found = wide.gather(-1, chosen)[:, 0] - wide.logsumexp(dim=-1)
    return np.asarray(found.cpu().numpy())
