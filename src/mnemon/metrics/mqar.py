"""Multi-query associative recall: the share of queries answered rightly, by slice and by gap.

Every number of pairs at one length is a slice, and a row of the result. The samples of a row depend on the settings and
a seed alone, so that every model is asked the same.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mnemon.data.encoding import IGNORED
from mnemon.data.mqar import MqarSamples, MqarSettings, generate
from mnemon.metrics.intervals import octaves, wilson_interval

_HELD_OUT = 0x6D716172
_BATCH_TOKENS = 4096


def held_out_samples(settings: MqarSettings, num_samples: int, seed: int = 0) -> MqarSamples:
    """Return the samples of a slice that models are measured on.

    Training draws from other streams of random numbers; that it meets one of these samples is not impossible, but less
    likely than anything that could be noticed.

    Args:
        settings: of the slice.
        num_samples: how many, at least 1.
        seed: the same seed gives the same samples.
    """
    return generate(settings, num_samples, seed=[_HELD_OUT, seed, settings.length, settings.num_pairs])


@torch.no_grad()
def queries_right(
    model: Any, samples: MqarSamples, *, batch_tokens: int = _BATCH_TOKENS, **options: Any
) -> NDArray[np.bool_]:
    """Tell which queries a model answers: whether the likeliest token at the query is its value.

    Args:
        model: any causal language model whose forward takes `logits_to_keep`, in evaluation mode.
        samples: N samples with P pairs.
        batch_tokens: most tokens per call; a call has one row in any case.
        options: further arguments of the model's forward.

    Returns:
        [N, P], the queries of a sample in the order in which they are asked.
    """
    keep = samples.settings.length - samples.settings.context_length
    rows = max(1, batch_tokens // samples.settings.length)
    labels = samples.labels[:, -keep:]
    right = np.zeros(labels.shape, dtype=np.bool_)
    for start in range(0, len(samples), rows):
        input_ids = torch.from_numpy(samples.input_ids[start : start + rows]).to(model.device)
        logits = model(input_ids=input_ids, logits_to_keep=keep, use_cache=False, **options).logits[:, -keep:]
        right[start : start + rows] = logits.argmax(-1).cpu().numpy() == labels[start : start + rows]
    return right[labels != IGNORED].reshape(len(samples), samples.settings.num_pairs)


def recall_row(samples: MqarSamples, right: NDArray[np.bool_]) -> dict[str, Any]:
    """Summarise a slice as one JSON value.

    Args:
        samples: what was asked.
        right: as `queries_right` returns it.

    Returns:
        `length`, `num_pairs`, `samples`; `right` of `asked` queries; `accuracy` with the ends of its 95 % Wilson
        interval, in which a sample, not a query, is one trial (queries of one sample depend on each other);
        `by_gap`: right and asked for gaps from `first` to `last`, in powers of two.
    """
    gaps = samples.gaps[samples.labels != IGNORED].reshape(right.shape)
    interval = wilson_interval(float(right.mean(axis=1).sum()), len(samples))
    return {
        "length": samples.settings.length,
        "num_pairs": samples.settings.num_pairs,
        "samples": len(samples),
        "right": int(right.sum()),
        "asked": right.size,
        "accuracy": asdict(interval),
        "by_gap": [
            {"first": first, "last": last, "right": int(right[at].sum()), "asked": int(at.sum())}
            for first, last in octaves(int(gaps.max()))
            if (at := (gaps >= first) & (gaps <= last)).any()
        ],
    }
