import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, false_discovery_control

from mnemon.errors import ConfigError
from mnemon.evaluation.statistics import (
    benjamini_hochberg,
    correct,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    paired_test,
    unpaired_difference,
)
from mnemon.metrics.intervals import wilson_interval

MARKS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)


def test_wilson_agrees_with_published_values() -> None:
    half = wilson_interval(50, 100)
    assert (round(half.low, 4), round(half.high, 4)) == (0.4038, 0.5962)
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662
    newcombe = wilson_interval(81, 263)
    assert (round(newcombe.low, 4), round(newcombe.high, 4)) == (0.2553, 0.3662)
    none = wilson_interval(0, 20)
    assert none.low == 0.0
    assert round(none.high, 4) == 0.1611


@given(st.integers(1, 5000), st.data())
def test_wilson_contains_the_mean_and_stays_in_range(num_samples: int, data: st.DataObject) -> None:
    num_right = data.draw(st.integers(0, num_samples))
    interval = wilson_interval(num_right, num_samples)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    mirrored = wilson_interval(num_samples - num_right, num_samples)
    assert math.isclose(mirrored.low, 1 - interval.high, abs_tol=1e-9)


@pytest.mark.parametrize(("right", "samples"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(right: int, samples: int) -> None:
    with pytest.raises(ConfigError):
        wilson_interval(right, samples)


def test_the_unpaired_difference_agrees_with_published_values() -> None:
    # Newcombe 1998, table II, method 10: 56/70 - 48/80 gives 0.0524 to 0.3339; 10/10 - 0/20 gives 0.6791 to 1
    one = unpaired_difference(wilson_interval(56, 70), wilson_interval(48, 80))
    assert (round(one.low, 4), round(one.high, 4)) == (0.0524, 0.3339)
    extreme = unpaired_difference(wilson_interval(10, 10), wilson_interval(0, 20))
    assert (round(extreme.low, 4), round(extreme.high, 4)) == (0.6791, 1.0)


def test_mcnemar_agrees_with_the_binomial_tail() -> None:
    first = [True] * 9 + [False] * 1 + [True] * 30
    second = [False] * 9 + [True] * 1 + [True] * 30
    assert math.isclose(mcnemar_exact(first, second), 2 * (1 + 10) / 2**10)


@given(MARKS)
def test_mcnemar_is_symmetric_and_blind_to_agreement(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    p_value = mcnemar_exact(first, second)
    assert 0 <= p_value <= 1
    assert math.isclose(p_value, mcnemar_exact(second, first))
    assert math.isclose(p_value, mcnemar_exact([*first, True, False], [*second, True, False]))


@given(MARKS)
def test_a_model_does_not_differ_from_itself(pairs: list[tuple[bool, bool]]) -> None:
    marks = [a for a, _ in pairs]
    result = paired_test(marks, marks)
    assert result.p_value == 1.0
    assert (result.difference.low, result.difference.mean, result.difference.high) == (0.0, 0.0, 0.0)


@given(MARKS, st.integers(0, 3))
def test_the_bootstrap_repeats_and_mirrors(pairs: list[tuple[bool, bool]], seed: int) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    interval = paired_bootstrap(first, second, seed=seed)
    assert interval == paired_bootstrap(first, second, seed=seed)
    assert -1 <= interval.low <= interval.high <= 1
    assert math.isclose(interval.mean, (sum(first) - sum(second)) / len(first), abs_tol=1e-12)


def test_the_bootstrap_interval_is_close_to_the_normal_one() -> None:
    first = [True] * 300 + [False] * 100 + [True] * 600
    second = [False] * 300 + [True] * 100 + [True] * 600
    interval = paired_bootstrap(first, second, num_resamples=20000)
    half = 1.96 * math.sqrt((0.4 - 0.2**2) / 1000)
    assert math.isclose(interval.low, 0.2 - half, abs_tol=0.004)
    assert math.isclose(interval.high, 0.2 + half, abs_tol=0.004)


def test_different_numbers_of_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="same samples"):
        mcnemar_exact([True], [True, False])


def test_holm_agrees_with_a_worked_example() -> None:
    assert [round(p, 3) for p in holm([0.01, 0.04, 0.03, 0.005])] == [0.03, 0.06, 0.06, 0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_never_lowers_a_p_value_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, corrected, strict=True))
    ordered = [q for _, q in sorted(zip(p_values, corrected, strict=True))]
    assert ordered == sorted(ordered)


@given(MARKS)
def test_mcnemar_is_the_two_sided_binomial_test_of_the_disagreements(pairs: list[tuple[bool, bool]]) -> None:
    first, second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    tail = binom.cdf(min(first, second), first + second, 0.5)
    expected = min(1.0, 2 * tail)
    assert math.isclose(mcnemar_exact([a for a, _ in pairs], [b for _, b in pairs]), expected, rel_tol=1e-9)


@given(MARKS)
def test_a_difference_is_symmetric_and_lies_in_its_interval(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    forth, back = paired_test(first, second), paired_test(second, first)
    assert (forth.only_first, forth.only_second) == (back.only_second, back.only_first)
    assert math.isclose(forth.difference.mean, -back.difference.mean, abs_tol=1e-12)
    assert forth.difference.low <= forth.difference.mean <= forth.difference.high or len(pairs) < 5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_the_largest_step_down_product(p_values: list[float]) -> None:
    ranked = sorted(p_values)
    count = len(ranked)
    expected = {p: min(1.0, max((count - j) * ranked[j] for j in range(i + 1))) for i, p in enumerate(ranked)}
    assert holm(p_values) == pytest.approx([expected[p] for p in p_values])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_agrees_with_scipy(p_values: list[float]) -> None:
    corrected = benjamini_hochberg(p_values)
    assert corrected == pytest.approx(list(false_discovery_control(p_values, method="bh")))
    assert all(p <= q <= h + 1e-12 for p, q, h in zip(p_values, corrected, holm(p_values), strict=True))


def test_a_correction_is_chosen_by_name() -> None:
    p_values = [0.01, 0.02, 0.03]
    assert correct(p_values, "holm") == pytest.approx([0.03, 0.04, 0.04])
    assert correct(p_values, "bh") == pytest.approx([0.03, 0.03, 0.03])
    assert benjamini_hochberg([]) == []
