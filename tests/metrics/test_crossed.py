"""Intervals over two crossed factors, training seeds and samples."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import ttest_rel

from mnemon.errors import ConfigError
from mnemon.metrics.intervals import Interval, crossed_bootstrap, crossed_difference, wilson_interval, within

SCORES = st.tuples(st.integers(1, 4), st.integers(1, 30)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.25, 1.0]))
)


@given(SCORES)
def test_the_interval_holds_the_mean_and_the_p_value_is_one(values: Any) -> None:
    interval, p_value = crossed_bootstrap(values, num_resamples=50)
    assert math.isclose(interval.mean, values.mean(), abs_tol=1e-12)
    assert interval.low <= interval.mean <= interval.high
    assert 0 <= p_value <= 1
    assert crossed_bootstrap(values, num_resamples=50) == (interval, p_value)


@given(SCORES, st.integers(1, 3), st.integers(0, 9))
def test_a_difference_changes_its_sign_with_the_order(first: Any, seeds: int, number: int) -> None:
    second = np.random.default_rng(number).integers(2, size=(seeds, first.shape[1])).astype(np.float64)
    forth, p_forth = crossed_difference(first, second, num_resamples=50)
    back, p_back = crossed_difference(second, first, num_resamples=50)
    assert math.isclose(forth.mean, -back.mean, abs_tol=1e-12)
    assert math.isclose(p_forth, p_back, abs_tol=1e-9)
    assert forth.low <= forth.mean <= forth.high


def test_equal_models_do_not_differ() -> None:
    values = np.random.default_rng(0).random((3, 40))
    interval, p_value = crossed_difference(values, values[:, ::1])
    assert interval.mean == 0.0
    assert interval.low < 0 < interval.high  # seeds of the two vary on their own
    assert p_value == 1.0
    one, p_one = crossed_difference(values[:1], values[:1])
    assert (one.low, one.high, p_one) == (0.0, 0.0, 1.0)


def test_with_one_seed_the_p_value_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(60), rng.random(60) - 0.1
    _, p_value = crossed_difference(first[None], second[None])
    assert math.isclose(p_value, ttest_rel(first, second).pvalue, rel_tol=1e-9)


def test_a_constant_difference_is_as_sure_as_the_signs_of_its_samples() -> None:
    ones, zeros = np.ones((2, 10)), np.zeros((2, 10))
    interval, p_value = crossed_difference(ones, zeros)
    assert (interval.low, interval.high) == (1.0, 1.0)
    assert p_value == 2.0**-9


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    alike = (rng.random((4, 100)) < 0.5).astype(np.float64)
    apart = (rng.random((4, 100)) < np.array([[0.2], [0.4], [0.6], [0.8]])).astype(np.float64)
    narrow, wide = (crossed_bootstrap(values)[0] for values in (alike, apart))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)])
def test_nothing_to_resample_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match="seeds and samples"):
        crossed_bootstrap(values)


def test_other_numbers_of_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="same samples"):
        crossed_difference(np.zeros((1, 3)), np.zeros((1, 4)))


def test_wilson_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Coverage over p on a grid of counts is exact: no simulation is needed."""
    from scipy.stats import binom

    for samples, truth in ((20, 0.5), (60, 0.1), (100, 0.85), (400, 0.02)):
        counts = np.arange(samples + 1)
        held = [(i := wilson_interval(int(k), samples)).low <= truth <= i.high for k in counts]
        coverage = float(binom.pmf(counts, samples, truth)[held].sum())
        assert 0.925 < coverage < 0.985


@pytest.mark.parametrize(("seeds", "spread", "least"), [(5, 0.0, 0.93), (5, 0.5, 0.92), (3, 0.5, 0.88)])
def test_crossed_intervals_hold_the_truth_as_often_as_they_say(seeds: int, spread: float, least: float) -> None:
    """Marks from a logistic model with an effect of the seed, of the sample, and chance in every mark."""
    rng = np.random.default_rng(3)
    effects = rng.normal(size=200_000) * math.sqrt(spread**2 + 1)
    truth = float((1 / (1 + np.exp(-effects))).mean())
    held, trials = 0, 250
    for trial in range(trials):
        logits = spread * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, 60))
        marks = (rng.random((seeds, 60)) < 1 / (1 + np.exp(-logits))).astype(np.float64)
        interval, _ = crossed_bootstrap(marks, num_resamples=200, seed=trial)
        held += interval.low <= truth <= interval.high
    assert least <= held / trials <= 1.0


def test_no_difference_is_found_significant_about_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(4)
    found, trials = 0, 300
    for _ in range(trials):
        easy = rng.normal(size=(1, 50))
        pair = [
            (rng.random((3, 50)) < 1 / (1 + np.exp(-easy - 0.3 * rng.normal(size=(3, 1))))).astype(np.float64)
            for _ in range(2)
        ]
        found += crossed_difference(*pair, num_resamples=2)[1] < 0.05
    assert found / trials < 0.07


def test_an_interval_ends_where_its_quantity_does() -> None:
    assert within(Interval(0.2, -1.7, 1.3), -1.0, 1.0) == Interval(0.2, -1.0, 1.0)
    assert within(Interval(0.2, 0.1, 0.3), 0.0, 1.0) == Interval(0.2, 0.1, 0.3)
