import doctest
import time
from typing import Any

import numpy as np
import pytest

from mnemon.data import mqar
from mnemon.data.encoding import IGNORED
from mnemon.data.mqar import FILLER, MqarSamples, MqarSettings, generate
from mnemon.errors import ConfigError

SETTINGS = [
    MqarSettings(vocab_size=64, length=32, num_pairs=5),
    MqarSettings(vocab_size=64, length=32, num_pairs=5, random_non_queries=False),
    MqarSettings(vocab_size=65, length=64, num_pairs=16, random_non_queries=False),
    MqarSettings(vocab_size=41, length=40, num_pairs=4, num_passes=3, random_non_queries=False),
    MqarSettings(vocab_size=5, length=4, num_pairs=1),
]


def test_the_sample_in_the_module_is_a_real_one() -> None:
    assert doctest.testmod(mqar).attempted == 5
    assert doctest.testmod(mqar).failed == 0


@pytest.mark.parametrize("settings", SETTINGS)
def test_samples_are_what_the_task_says(settings: MqarSettings) -> None:
    samples = generate(settings, 200, seed=3)
    half, pairs, start = settings.vocab_size // 2, settings.num_pairs, settings.context_length
    assert samples.input_ids.shape == samples.labels.shape == samples.gaps.shape == (200, settings.length)
    for ids, labels, gaps in zip(samples.input_ids, samples.labels, samples.gaps, strict=True):
        keys, values = ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert ((keys >= 1) & (keys < half)).all()
        assert ((values >= half) & (values < settings.vocab_size)).all()
        for shown in range(settings.num_passes):
            assert (ids[2 * pairs * shown : 2 * pairs * (shown + 1)] == ids[: 2 * pairs]).all()
        queries = np.flatnonzero(labels != IGNORED)
        assert len(queries) == pairs
        assert (queries >= start).all()
        assert (queries % 2 == 0).all()
        assert sorted(ids[queries]) == sorted(keys), "every key is asked for once"
        value_of = dict(zip(keys, values, strict=True))
        assert [value_of[key] for key in ids[queries]] == list(labels[queries])
        for query in queries:
            last = max(np.flatnonzero(ids[:start:2] == ids[query])) * 2
            assert gaps[query] == query - last
        assert (gaps[labels == IGNORED] == 0).all()
        others = np.setdiff1d(np.arange(start, settings.length), queries)
        if not settings.random_non_queries:
            assert (ids[others] == FILLER).all()


def same(a: MqarSamples, b: MqarSamples) -> bool:
    return (a.input_ids == b.input_ids).all() and (a.labels == b.labels).all() and (a.gaps == b.gaps).all()


def test_the_seed_decides_everything_and_the_global_generators_nothing() -> None:
    settings = MqarSettings(vocab_size=100, length=32)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    first = generate(settings, 50, seed=7)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    np.random.seed(1)
    assert same(first, generate(settings, 50, seed=7))
    assert not same(first, generate(settings, 50, seed=8))
    assert not same(generate(settings, 50, seed=[7, 0]), generate(settings, 50, seed=[7, 1]))


def test_keys_and_values_are_uniform_and_their_order_too() -> None:
    samples = generate(MqarSettings(vocab_size=20, length=16, num_pairs=3), 30_000, seed=1)
    for column in range(6):
        shown = samples.input_ids[:, column]
        choices = np.arange(1, 10) if column % 2 == 0 else np.arange(10, 20)
        expected = 30_000 / len(choices)
        chi_squared = sum(((shown == choice).sum() - expected) ** 2 / expected for choice in choices)
        assert chi_squared < 30, f"column {column}: {chi_squared}"  # p below 0.001 for 9 degrees of freedom


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_places_follow_the_law_of_successive_draws(power_a: float) -> None:
    settings = MqarSettings(vocab_size=64, length=16, num_pairs=2, power_a=power_a)
    samples = generate(settings, 40_000, seed=2)
    weights = np.arange(1, settings.num_places + 1) ** (power_a - 1)
    chances = weights / weights.sum()
    places = []
    for pair in range(2):
        asked = (samples.input_ids == samples.input_ids[:, [2 * pair]]) & (samples.labels != IGNORED)
        places.append((2 * pair + samples.gaps[asked] - settings.context_length) // 2)
    seen = np.bincount(places[0], minlength=settings.num_places) / 40_000
    assert np.abs(seen - chances).max() < 4 * np.sqrt(0.25 / 40_000)
    # The second pair's place, where the first one's is 0, follows the same weights without that place.
    given = places[0] == 0
    rest = np.where(np.arange(settings.num_places) == 0, 0, weights)
    seen = np.bincount(places[1][given], minlength=settings.num_places) / given.sum()
    assert np.abs(seen - rest / rest.sum()).max() < 4 * np.sqrt(0.25 / given.sum())


def test_fillers_are_uniform_over_the_whole_vocabulary() -> None:
    samples = generate(MqarSettings(vocab_size=40, length=32, num_pairs=2), 5_000, seed=0)
    fillers = samples.input_ids[:, 5:][samples.labels[:, 5:] == IGNORED]
    counts = np.bincount(fillers, minlength=40)
    assert np.abs(counts / counts.sum() - 1 / 40).max() < 0.002


def test_labels_for_the_next_token_lose_nothing() -> None:
    samples = generate(MqarSettings(vocab_size=64, length=32, num_pairs=8), 100, seed=0)
    shifted = samples.next_token_labels()
    assert (shifted[:, 0] == IGNORED).all()
    assert (shifted[:, 1:] == samples.labels[:, :-1]).all()
    assert (shifted != IGNORED).sum() == (samples.labels != IGNORED).sum() == 800


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 31}, "expected an even length, got 31; use 32"),
        ({"length": 8, "num_pairs": 4}, r"2 num_pairs \(num_passes \+ 1\) = 16 tokens, got length 8; use 16 or more"),
        ({"length": 64, "num_pairs": 8, "num_passes": 4}, "= 80 tokens, got length 64; use 80 or more"),
        ({"vocab_size": 64, "length": 64}, "a vocab_size above the length 64, got 64; use 65 or more"),
        ({"num_pairs": 0}, "num_pairs of at least 1, got 0"),
        ({"num_passes": 0}, "num_passes of at least 1, got 0"),
        ({"power_a": 0.0}, "power_a above 0, got 0.0; use 0.01"),
    ],
)
def test_what_cannot_be_is_refused_with_a_value_that_works(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        MqarSettings(**options)
    assert "\n" not in str(caught.value)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_samples of at least 1, got 0"):
        generate(MqarSettings(), 0)
    with pytest.raises(ConfigError, match="seed of at least 0, got -1"):
        generate(MqarSettings(), 1, seed=-1)


def test_a_hundred_thousand_samples_take_seconds() -> None:
    start = time.perf_counter()
    generate(MqarSettings(length=64, num_pairs=8), 100_000)
    assert time.perf_counter() - start < 10
