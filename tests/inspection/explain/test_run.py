"""Explaining: planted units are found and score high, noise scores about 0, and held-out text is never shown."""

import doctest
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from mnemon.errors import ConfigError, ShapeError
from mnemon.inspection.explain import features
from mnemon.inspection.explain.activations import (
    Unit,
    UnitActivations,
    load_activations,
    most_varied,
    save_activations,
)
from mnemon.inspection.explain.choose import explainer_from_option
from mnemon.inspection.explain.explainer import Evidence, ExplainerError, Hypothesis
from mnemon.inspection.explain.features import REACH, feature_values
from mnemon.inspection.explain.patterns import PatternExplainer
from mnemon.inspection.explain.run import EXCERPTS_SCORED, correlation, explain, strongest_excerpts
from mnemon.inspection.trace import Explanation, ReadText, Source, Trace, load_trace, save_trace

NAMES, AFTER, FIRST, RANDOM, CONSTANT = range(5)


@dataclass
class Spy:
    """Remembers what it is shown; simulates 1 on names. `failing` numbers of its simulations fail."""

    window: int | None = None
    failing: Sequence[int] = ()
    lasts: bool = False
    name: str = "spy"
    shown: list[tuple[str, ...]] = field(default_factory=list)
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def explain(self, evidence: Evidence) -> Hypothesis:
        self.shown.append(evidence.pieces)
        return Hypothesis("names")

    def simulate(self, hypothesis: Hypothesis, pieces: Sequence[str]) -> np.ndarray:
        self.asked.append(tuple(pieces))
        if len(self.asked) - 1 in self.failing:
            raise ExplainerError("the line went dead", self.lasts)
        return np.array([float(piece.strip() in ("Mary", "John", "Sandra", "Daniel")) for piece in pieces])


class Silent:
    """Never answers."""

    name, window = "silent", 16

    def __init__(self) -> None:
        self.calls = 0

    def explain(self, evidence: Evidence) -> Hypothesis:
        self.calls += 1
        raise ExplainerError("nobody answers", lasts=True)

    def simulate(self, hypothesis: Hypothesis, pieces: Sequence[str]) -> np.ndarray:
        raise AssertionError("nothing to simulate")


def built_in(planted: UnitActivations, unit: int) -> Explanation:
    (explanation,) = explain(planted, PatternExplainer(), [unit])
    return explanation


def test_a_unit_active_on_names_is_explained_by_them(planted: UnitActivations) -> None:
    found = built_in(planted, NAMES)
    assert found.text is not None
    assert found.text.startswith("on capitalised words")
    assert found.score is not None
    assert found.score > 0.95
    assert found.num_tokens == planted.num_tokens - planted.num_tokens // 2
    assert found.note is None
    assert found.meaning == "the share of the token's reads of the memory that falls on this slot"


def test_a_unit_active_after_three_words_is_explained_by_them(planted: UnitActivations) -> None:
    found = built_in(planted, AFTER)
    assert found.text is not None
    assert "after “went to the”" in found.text
    assert found.score is not None
    assert found.score > 0.95


def test_a_unit_active_on_first_words_is_explained_by_the_place(planted: UnitActivations) -> None:
    found = built_in(planted, FIRST)
    assert found.score is not None
    assert found.score > 0.95
    assert found.text in ("on token 1 of a sentence", "after “.”") or "capitalised" in str(found.text)


def test_random_activations_score_about_zero(planted: UnitActivations) -> None:
    noise = np.random.default_rng(1).normal(size=(planted.num_tokens, 12)).astype(np.float16)
    units = tuple(Unit(f"noise {index}", 0, index) for index in range(12))
    found = explain(replace(planted, units=units, values=noise), PatternExplainer())
    scores = [explanation.score for explanation in found if explanation.score is not None]
    assert len(scores) == 12
    assert max(map(abs, scores)) < 0.12  # the standard error of one is about 0.03
    assert abs(float(np.mean(scores))) < 0.03
    assert all(str(explanation.text).startswith("hardly predictable") for explanation in found)


def test_a_constant_unit_has_no_score_and_says_why(planted: UnitActivations) -> None:
    found = built_in(planted, CONSTANT)
    assert found.text == "equally active on every token"
    assert (found.score, found.baseline) == (None, None)
    assert found.note == "no score: the unit is the same on every held-out token"


def test_the_baseline_is_what_the_simulation_scores_on_other_units(planted: UnitActivations) -> None:
    found = built_in(planted, NAMES)
    half = planted.num_tokens // 2
    evidence = Evidence("names", "", planted.pieces[:half], planted.values[:half, NAMES], ())
    simulated = PatternExplainer().simulate(PatternExplainer().explain(evidence), planted.pieces[half:])
    others = [correlation(simulated, planted.values[half:, other]) for other in (AFTER, FIRST, RANDOM)]
    assert found.baseline == pytest.approx(np.mean([score for score in others if score is not None]))
    twins = planted.select([NAMES, NAMES])
    (twin,) = explain(twins, PatternExplainer(), [0])
    assert twin.baseline == pytest.approx(twin.score)  # an explanation that is about more than its unit is found out


def test_a_single_unit_is_compared_with_itself_in_random_order(planted: UnitActivations) -> None:
    (found,) = explain(planted.select([NAMES]), PatternExplainer())
    assert found.baseline is not None
    assert abs(found.baseline) < 0.05


@pytest.mark.parametrize("window", [None, 16])
def test_what_scores_an_explanation_was_never_shown(planted: UnitActivations, window: int | None) -> None:
    numbered = replace(planted, pieces=tuple(f" word{index}" for index in range(planted.num_tokens)))
    spy = Spy(window)
    explain(numbered, spy, [NAMES])
    shown = {piece for pieces in spy.shown for piece in pieces}
    asked = {piece for pieces in spy.asked for piece in pieces}
    assert shown == set(numbered.pieces[: planted.num_tokens // 2])
    assert asked
    assert not shown & asked


def test_an_explainer_with_a_window_is_tested_on_top_and_random_excerpts(planted: UnitActivations) -> None:
    spy = Spy(window=16)
    (found,) = explain(planted, spy, [AFTER])
    assert [len(pieces) for pieces in spy.asked] == [16] * EXCERPTS_SCORED
    assert found.num_tokens == 16 * EXCERPTS_SCORED
    half = planted.num_tokens // 2
    strength = planted.values[half : half + (planted.num_tokens - half) // 16 * 16, AFTER].reshape(-1, 16).max(axis=1)
    top = {
        planted.pieces[half + 16 * number : half + 16 * number + 16]
        for number in np.argsort(-strength.astype(float), kind="stable")[: EXCERPTS_SCORED // 2]
    }
    assert top <= set(spy.asked)
    assert explain(planted, Spy(window=16), [AFTER])[0].score == found.score


def test_excerpts_that_fail_are_left_out_and_noted(planted: UnitActivations) -> None:
    (found,) = explain(planted, Spy(window=16, failing=(1, 4)), [NAMES])
    assert found.num_tokens == 16 * (EXCERPTS_SCORED - 2)
    assert found.score is not None
    assert found.score > 0.9
    assert found.note == "2 of 10 held-out excerpts were not simulated: the line went dead"


def test_after_a_lasting_failure_nobody_is_asked_again(planted: UnitActivations) -> None:
    silent = Silent()
    found = explain(planted, silent, [NAMES, AFTER, RANDOM])
    assert silent.calls == 1
    assert [(one.text, one.score, one.note) for one in found] == [(None, None, "nobody answers")] * 3
    assert all(one.excerpts for one in found)
    spy = Spy(window=16, failing=(2,), lasts=True)
    (first, second) = explain(planted, spy, [NAMES, AFTER])
    assert len(spy.asked) == 3
    assert first.text == "names"
    assert first.num_tokens == 32
    assert second.note == "the line went dead"


def test_a_text_too_short_is_noted(planted: UnitActivations) -> None:
    short = replace(planted, pieces=planted.pieces[:10], ids=planted.ids[:10], values=planted.values[:10])
    (found,) = explain(short, PatternExplainer(), [NAMES])
    assert found.text is None
    assert found.note == "the text has 10 tokens; an explanation needs at least 16"


def test_progress_is_told(planted: UnitActivations) -> None:
    told: list[tuple[int, int]] = []
    explain(planted, Spy(), [0, 1], progress=lambda done, all_: told.append((done, all_)))
    assert told == [(1, 2), (2, 2)]


def test_excerpts_hold_the_strongest_tokens_and_do_not_overlap() -> None:
    values = np.zeros(200, dtype=np.float16)
    values[[150, 20, 25, 199]] = [3, 2, 1.9, 1]
    pieces = [f" {index}" for index in range(200)]
    excerpts = strongest_excerpts(pieces, values, 3)
    assert [float(excerpt.activations.max()) for excerpt in excerpts] == [3, 2, 1]
    tokens = [token for excerpt in excerpts for token in excerpt.tokens]
    assert len(tokens) == len(set(tokens))
    assert " 150" in excerpts[0].tokens


def test_correlation_is_pearsons_and_undefined_for_constants() -> None:
    numbers = np.random.default_rng(0)
    one, two = numbers.normal(size=(2, 50))
    assert correlation(one, two) == pytest.approx(np.corrcoef(one, two)[0, 1])
    assert correlation(one, 3 * one + 1) == pytest.approx(1)
    assert correlation(one, np.full(50, 0.1)) is None
    assert correlation(one[:1], two[:1]) is None
    gaps = np.where(np.arange(50) % 2, one, np.nan)
    assert correlation(gaps, two) == pytest.approx(np.corrcoef(one[1::2], two[1::2])[0, 1])


def test_features_are_what_their_documentation_shows() -> None:
    result = doctest.testmod(features)
    assert result.attempted == 3
    assert result.failed == 0


def test_kinds_of_tokens_are_told_apart() -> None:
    pieces = ["The", " USA", " in", " 1998", ",", "ing", "\n", " ", " “Paris"]
    kinds = [
        "capitalised words", "words in capitals", "words in lower case", "numbers", "punctuation", "parts of words",
        "white space", "white space", "capitalised words",
    ]  # fmt: skip
    assert feature_values(pieces, "kind") == kinds


def test_a_word_is_near_for_a_while() -> None:
    pieces = [" a", *[" b"] * (REACH + 2)]
    assert feature_values(pieces, features.nearby("a")) == ["no", *["yes"] * REACH, "no", "no"]


def test_explanations_come_back_from_a_trace(planted: UnitActivations, tmp_path: Path) -> None:
    text = ReadText(("a",), np.array([0, 1]), np.array([0, 1]), complete=True)
    found = explain(planted, PatternExplainer(), [NAMES, CONSTANT])
    trace = Trace("m", "lm2", "f", Source("text", "a.txt"), text, explanations=found)
    back = load_trace(save_trace(tmp_path / "a.trace.safetensors", trace)).explanations
    for one, two in zip(found, back, strict=True):
        assert replace(one, excerpts=()) == replace(two, excerpts=())
        np.testing.assert_array_equal(one.excerpts[0].activations, two.excerpts[0].activations)


def test_activations_come_back_from_their_file(planted: UnitActivations, tmp_path: Path) -> None:
    back = load_activations(save_activations(tmp_path / "a.activations.safetensors", planted))
    assert (back.units, back.pieces, back.kind) == (planted.units, planted.pieces, planted.kind)
    np.testing.assert_array_equal(back.values, planted.values)
    assert back.values.dtype == np.float16


def test_units_are_found_by_block_and_index_and_ranked_by_variation(planted: UnitActivations) -> None:
    assert planted.column(0, 2) == FIRST
    with pytest.raises(ConfigError, match="block 1, unit 2 was not recorded; recorded: names; "):
        planted.column(1, 2)
    assert most_varied(planted, 2) == (RANDOM, NAMES)
    assert most_varied(planted, 99)[-1] == CONSTANT


def test_activations_of_the_wrong_shape_are_refused(planted: UnitActivations) -> None:
    with pytest.raises(ShapeError, match="tokens and 5 units"):
        replace(planted, values=planted.values[:-1])


def test_the_option_names_the_built_in_explainer() -> None:
    assert explainer_from_option().name == "built-in"


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("http://localhost:1/v1", None, "add --explainer-model NAME"),
        ("built-in", "llama", "--explainer-model is for an endpoint"),
        ("no-such-folder-or-model", None, "no-such-folder-or-model"),
        ("http://", "llama", "expected the address of an endpoint"),
        ("http://host:port/v1", "llama", "expected the address of an endpoint"),
    ],
)
def test_an_option_that_cannot_be_is_refused_in_one_line(name: str, model: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        explainer_from_option(name, model)
    assert "\n" not in str(caught.value)
