"""Multi-query associative recall (MQAR): key-value pairs, then some of the keys again, whose values are to be told.

Keys come from the lower half of the vocabulary, values from the upper half; 0 is filler. A sample shows `num_pairs`
pairs, then asks for every key once, at places drawn with a heavy bias to the first ones. The label stands at the index
of the asked key itself: the value is to be told in the step that reads the key, and is never shown again.

>>> settings = MqarSettings(vocab_size=20, length=16, num_pairs=2, random_non_queries=False)
>>> sample = generate(settings, num_samples=1, seed=4)
>>> print(*sample.input_ids[0])
6 10 9 18 6 0 0 0 9 0 0 0 0 0 0 0
>>> print(*(label if label != IGNORED else "." for label in sample.labels[0]))
. . . . 10 . . . 18 . . . . . . .
>>> print(*(gap or "." for gap in sample.gaps[0]))
. . . . 4 . . . 6 . . . . . . .

Everything depends on the settings and the seed alone; the global generators are neither read nor changed. Batches for
training are made by `mnemon.training.mqar_batches`.

Source: "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnemon.data.encoding import IGNORED
from mnemon.errors import ConfigError

Ids = NDArray[np.int64]

FILLER = 0


@dataclass(frozen=True)
class MqarSettings:
    """What decides the law of the samples; the defaults are the smallest setting of the paper.

    Attributes:
        vocab_size: ids 0 ... vocab_size - 1, more than `length`; larger makes guessing harder.
        length: tokens of a sample, even; more of them lie between a pair and its query.
        num_pairs: key-value pairs, each asked for once; at least 1, and with all passes and queries they must fit
            into the length: 2 num_pairs (num_passes + 1) <= length.
        power_a: exponent of the law of the gaps, above 0: place n is drawn with weight n^(power_a - 1). 0.01 asks
            early, 1 anywhere.
        num_passes: how often the whole list of pairs is shown, at least 1.
        random_non_queries: fill the tokens between the queries with any ids instead of `FILLER`; they may coincide
            with keys and values, and only the labels tell a query.

    Raises:
        ConfigError: the values exclude each other; the message names the constraint and a value that works.
    """

    vocab_size: int = 8192
    length: int = 64
    num_pairs: int = 4
    power_a: float = 0.01
    num_passes: int = 1
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_passes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mqar: expected {name} of at least 1, got {getattr(self, name)}; use 1 or more")
        if not 0 < self.power_a < float("inf"):
            raise ConfigError(f"mqar: expected power_a above 0, got {self.power_a}; use 0.01 (early) to 1 (anywhere)")
        needed = 2 * self.num_pairs * (self.num_passes + 1)
        if self.length % 2:
            raise ConfigError(f"mqar: expected an even length, got {self.length}; use {max(self.length + 1, needed)}")
        if self.length < needed:
            raise ConfigError(
                f"mqar: {self.num_pairs} pairs shown {self.num_passes} times and asked once need 2 num_pairs "
                f"(num_passes + 1) = {needed} tokens, got length {self.length}; use {needed} or more"
            )
        if self.vocab_size <= self.length:
            raise ConfigError(
                f"mqar: expected a vocab_size above the length {self.length}, got {self.vocab_size}; "
                f"use {self.length + 1} or more"
            )

    @property
    def context_length(self) -> int:
        """Return the tokens before the first query: all passes over the pairs."""
        return 2 * self.num_pairs * self.num_passes

    @property
    def num_places(self) -> int:
        """Return the places, two tokens each, at which a query may stand."""
        return (self.length - self.context_length) // 2


@dataclass(frozen=True, eq=False)
class MqarSamples:
    """Samples of one setting, row by row; every row has `num_pairs` labels.

    Attributes:
        settings: what they were made with.
        input_ids: [N, T], what the model reads.
        labels: [N, T], the value at the index of its query, `IGNORED` elsewhere. Not shifted: the output at that very
            index is to be the value.
        gaps: [N, T], tokens from the last showing of the asked key to its query; 0 where nothing is asked.
    """

    settings: MqarSettings
    input_ids: Ids
    labels: Ids
    gaps: Ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def next_token_labels(self) -> Ids:
        """Return the labels one index later, [N, T], for losses in which output t is compared with label t + 1.

        Nothing is lost: a query stands at an even index of an even length, so never at the last one.
        """
        shifted = np.full_like(self.labels, IGNORED)
        shifted[:, 1:] = self.labels[:, :-1]
        return shifted

    def records(self) -> list[dict[str, Any]]:
        """Return one JSON value per sample: `input_ids`, `labels` and `gaps` as lists."""
        columns = (self.input_ids.tolist(), self.labels.tolist(), self.gaps.tolist())
        return [{"input_ids": ids, "labels": labels, "gaps": gaps} for ids, labels, gaps in zip(*columns, strict=True)]


def generate(settings: MqarSettings, num_samples: int, *, seed: int | Sequence[int] = 0) -> MqarSamples:
    """Generate samples, all at once.

        input = k_1 v_1 ... k_P v_P (num_passes times), then places of two tokens; place s_i begins with k_i
        P(place n) ~ n^(a - 1), n = 1 ... G, without replacement; the i-th draw is the place of pair i

    Keys and values are distinct within a sample, uniform, and drawn independently. The published generator (Zoology)
    gives the same law with three differences: its fillers come from a generator that its seed does not touch, it draws
    sample by sample, and its num_passes above 1 does not run; here all choices come from one local generator, and every
    number of passes works.

    Args:
        settings: length, pairs, vocabulary, law of the gaps.
        num_samples: how many, at least 1.
        seed: of the local generator; several integers give independent streams.

    Returns:
        `MqarSamples` with N = `num_samples` rows.

    Raises:
        ConfigError: `num_samples` is below 1 or a seed below 0.

    Source:
        Zoology, arXiv 2312.04927, section 4 and appendix.
    """
    if num_samples < 1:
        raise ConfigError(f"mqar: expected num_samples of at least 1, got {num_samples}; use 1 or more")
    if any(number < 0 for number in ([seed] if isinstance(seed, int) else seed)):
        raise ConfigError(f"mqar: expected a seed of at least 0, got {seed}; use 0 or more")
    rng = np.random.default_rng(seed)
    half, pairs, start = settings.vocab_size // 2, settings.num_pairs, settings.context_length
    keys = 1 + _distinct(rng, num_samples, half - 1, pairs)
    values = half + _distinct(rng, num_samples, settings.vocab_size - half, pairs)
    input_ids = np.full((num_samples, settings.length), FILLER, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORED)
    gaps = np.zeros_like(input_ids)

    shown = np.stack([keys, values], axis=2).reshape(num_samples, 2 * pairs)
    input_ids[:, :start] = np.tile(shown, settings.num_passes)
    queries = start + 2 * _places(rng, settings, num_samples)
    last_shown = start - 2 * pairs + 2 * np.arange(pairs)
    np.put_along_axis(input_ids, queries, keys, axis=1)
    np.put_along_axis(labels, queries, values, axis=1)
    np.put_along_axis(gaps, queries, queries - last_shown, axis=1)
    if settings.random_non_queries:
        fillers = rng.integers(settings.vocab_size, size=input_ids.shape)
        input_ids = np.where(input_ids == FILLER, fillers, input_ids)
    return MqarSamples(settings, input_ids, labels, gaps)


def _distinct(rng: np.random.Generator, rows: int, choices: int, count: int) -> Ids:
    """Draw `count` distinct numbers below `choices` per row, every order equally likely.

    Floyd's algorithm: uniform sets at a cost that does not grow with `choices`; a shuffle then makes the order uniform.
    """
    drawn = np.empty((rows, count), dtype=np.int64)
    for column, top in enumerate(range(choices - count, choices)):
        pick = rng.integers(top + 1, size=rows)
        taken = (drawn[:, :column] == pick[:, None]).any(axis=1)
        drawn[:, column] = np.where(taken, top, pick)
    return np.take_along_axis(drawn, rng.random((rows, count)).argsort(axis=1), axis=1)


def _places(rng: np.random.Generator, settings: MqarSettings, rows: int) -> Ids:
    """Draw the place of every pair's query, [rows, pairs], numbered from 0.

    The smallest of exponential variables with rates w, in order, are successive draws with weights w without
    replacement (the "exponential clocks" form of the Gumbel top-k trick).
    """
    weights = np.arange(1, settings.num_places + 1) ** (settings.power_a - 1.0)
    rings = rng.standard_exponential((rows, settings.num_places)) / weights
    return rings.argsort(axis=1)[:, : settings.num_pairs]
