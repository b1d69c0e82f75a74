"""Explain units, simulate them on text the explanation was not made from, and score the simulation.

A text of T tokens is cut in the middle: explanations are made from the first half, and tested on the second.

    score = Pearson correlation of the simulated and the true activations on held-out tokens

Which held-out tokens: all of them, if the explainer simulates a text as a whole; else `EXCERPTS_SCORED` stretches of
`window` tokens, half of them where the unit is most active and half drawn at random from the others, as one sequence
("top and random" in Bills et al. 2023: at random alone, a rarely active unit would mostly be tested on nothing).

    baseline = mean of the correlations of the same simulation with up to 16 other units on the same tokens

An explanation says something about its unit if its score is clearly above its baseline. With a single unit the baseline
is taken from the unit's own activations in random order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mnemon.inspection.explain.activations import KINDS, UnitActivations
from mnemon.inspection.explain.explainer import Evidence, Explainer, ExplainerError, Hypothesis
from mnemon.inspection.trace import Excerpt, Explanation, Floats

EXCERPTS_SHOWN = 6
EXCERPTS_SCORED = 10
FEWEST_TOKENS = 16

_BEFORE, _BEHIND = 12, 4  # tokens around the strongest one of an excerpt
_OTHERS = 16
_SHORT = "the text has {tokens} tokens; an explanation needs at least {fewest}"
_UNDEFINED = "no score: {what} the same on every held-out token"


def explain(
    activations: UnitActivations,
    explainer: Explainer,
    units: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Explanation, ...]:
    """Explain units and score the explanations.

    An explainer that fails costs its own words and scores, nothing else: the explanation then carries a note. Once it
    fails in a way that lasts, it is not asked again.

    Args:
        activations: of the units to explain, and of others to compare them with.
        explainer: who explains.
        units: numbers of the units to explain, in the order wanted; None = all.
        seed: of the random excerpts and of the units compared with.
        progress: called after every unit with the units done and the units to do.

    Returns:
        One explanation per unit.
    """
    chosen = range(len(activations.units)) if units is None else units
    explanations: list[Explanation] = []
    gone: ExplainerError | None = None
    for column in chosen:
        test = _put_to_test(activations, column, explainer, seed, gone)
        gone = test.error if test.error is not None and test.error.lasts else gone
        explanations.append(_explanation(test, activations, column, explainer.name, seed))
        if progress is not None:
            progress(len(explanations), len(chosen))
    return tuple(explanations)


def correlation(simulated: Floats, true: Floats) -> float | None:
    """Return the Pearson correlation of two sequences, over the places where both are finite.

    None where it is undefined: fewer than two such places, or one of the two is constant there.
    """
    known = np.isfinite(simulated) & np.isfinite(true)
    deviations = [values[known].astype(np.float64) for values in (simulated, true)]
    if known.sum() < 2:
        return None
    norms = []
    for values in deviations:
        size = float(np.abs(values).max())
        values -= values.mean()
        norms.append(float(np.linalg.norm(values)))
        if norms[-1] <= 1e-9 * size * np.sqrt(len(values)):  # what rounding leaves of a constant
            return None
    return float(np.clip(deviations[0] @ deviations[1] / (norms[0] * norms[1]), -1, 1))


def strongest_excerpts(pieces: Sequence[str], activations: Floats, count: int = EXCERPTS_SHOWN) -> tuple[Excerpt, ...]:
    """Return excerpts around the strongest activations of a text, the strongest first, none overlapping another.

    Args:
        pieces: texts of the tokens.
        activations: one per token.
        count: excerpts wanted; there are fewer where the text is short.
    """
    taken = np.zeros(len(pieces), dtype=bool)
    excerpts: list[Excerpt] = []
    for token in np.argsort(-activations.astype(np.float64), kind="stable"):
        first, end = max(int(token) - _BEFORE, 0), min(int(token) + _BEHIND + 1, len(pieces))
        if taken[first:end].any():
            continue
        taken[first:end] = True
        excerpts.append(Excerpt(tuple(pieces[first:end]), activations[first:end].astype(np.float16)))
        if len(excerpts) == count:
            break
    return tuple(excerpts)


@dataclass
class _Test:
    """An explanation on trial.

    Attributes:
        excerpts: what the explainer was shown.
        hypothesis: what it said; None if it failed.
        simulated: its simulation of held-out tokens, without those that it did not simulate.
        places: numbers of these tokens in the text.
        error: why the explainer failed, if it did.
        notes: what the reader has to know.
    """

    excerpts: tuple[Excerpt, ...]
    hypothesis: Hypothesis | None = None
    simulated: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    places: NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, dtype=np.intp))
    error: ExplainerError | None = None
    notes: list[str] = field(default_factory=list)


def _explanation(test: _Test, activations: UnitActivations, column: int, name: str, seed: int) -> Explanation:
    """Score a simulation."""
    unit, true = activations.units[column], activations.values[test.places, column]
    score = correlation(test.simulated, true)
    notes = list(test.notes)
    if len(test.places) and score is None:
        is_constant = correlation(true, true) is None
        notes.append(_UNDEFINED.format(what="the unit is" if is_constant else "the simulation is"))
    return Explanation(
        unit=unit.name,
        block=unit.block,
        index=unit.index,
        explainer=name,
        text=None if test.hypothesis is None else test.hypothesis.text,
        score=score,
        num_tokens=len(test.places),
        excerpts=test.excerpts,
        note="; ".join(notes) or None,
        baseline=None if score is None else _baseline(test, activations, column, seed),
        meaning=KINDS[activations.kind],
    )


def _put_to_test(
    activations: UnitActivations,
    column: int,
    explainer: Explainer,
    seed: int,
    gone: ExplainerError | None,
) -> _Test:
    """Have one unit explained from the first half of a text and simulated on the second.

    Args:
        activations: of all units.
        column: the unit.
        explainer: who explains.
        seed: of the random excerpts.
        gone: why the explainer is not to be asked any more, if so.
    """
    half = activations.num_tokens // 2
    pieces, own = activations.pieces[:half], activations.values[:half, column]
    test = _Test(strongest_excerpts(pieces, own))
    if activations.num_tokens < FEWEST_TOKENS:
        test.notes.append(_SHORT.format(tokens=activations.num_tokens, fewest=FEWEST_TOKENS))
        return test
    if gone is not None:
        test.notes.append(str(gone))
        return test
    unit, meaning = activations.units[column].name, KINDS[activations.kind]
    try:
        test.hypothesis = explainer.explain(Evidence(unit, meaning, pieces, own, test.excerpts))
    except ExplainerError as error:
        test.error = error
        test.notes.append(str(error))
        return test
    stretches = [half + stretch for stretch in _held_out(activations.values[half:, column], explainer, seed)]
    _simulate(test, explainer, activations.pieces, stretches)
    return test


def _simulate(test: _Test, explainer: Explainer, pieces: Sequence[str], stretches: list[NDArray[np.intp]]) -> None:
    """Simulate stretches of a text; what fails is left out and noted."""
    assert test.hypothesis is not None
    failed = 0
    for stretch in stretches:
        values = np.full(len(stretch), np.nan)
        if test.error is None or not test.error.lasts:
            try:
                found = explainer.simulate(test.hypothesis, [pieces[token] for token in stretch])
                values = np.asarray(found, dtype=np.float64)
            except ExplainerError as error:
                test.error = error
        known = np.isfinite(values)
        failed += not known.any()
        test.simulated = np.concatenate([test.simulated, values[known]])
        test.places = np.concatenate([test.places, stretch[known]])
    if test.error is not None:
        test.notes.append(f"{failed} of {len(stretches)} held-out excerpts were not simulated: {test.error}")


def _held_out(values: Floats, explainer: Explainer, seed: int) -> list[NDArray[np.intp]]:
    """Choose the stretches of the held-out text that are simulated; returns the tokens of each, in order."""
    tokens, window = np.arange(len(values)), explainer.window
    if window is None or len(values) <= window:
        return [tokens]
    stretches = [tokens[first : first + window] for first in range(0, len(values) - window + 1, window)]
    strength = np.array([values[stretch].max() for stretch in stretches])
    order = np.argsort(-strength, kind="stable")
    top, others = order[: EXCERPTS_SCORED // 2], order[EXCERPTS_SCORED // 2 :]
    drawn = np.random.default_rng(seed).permutation(others)[: EXCERPTS_SCORED - len(top)]
    return [stretches[number] for number in sorted([*top.tolist(), *drawn.tolist()])]


def _baseline(test: _Test, activations: UnitActivations, column: int, seed: int) -> float | None:
    """Return the mean correlation of a simulation with units it is not about."""
    numbers = np.random.default_rng(seed)
    others = np.delete(np.arange(len(activations.units)), column)
    compared = [activations.values[test.places, other] for other in numbers.permutation(others)[:_OTHERS]]
    if not len(others):
        compared = [numbers.permutation(activations.values[test.places, column]) for _ in range(_OTHERS)]
    scores = [score for other in compared if (score := correlation(test.simulated, other)) is not None]
    return float(np.mean(scores)) if scores else None
