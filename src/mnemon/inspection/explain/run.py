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

import numpy as np
from numpy.typing import NDArray

from mnemon.inspection.explain.activations import KINDS, UnitActivations
from mnemon.inspection.explain.explainer import Evidence, Explainer, ExplainerError, Hypothesis
from mnemon.inspection.trace import Excerpt, Explanation, Floats, Integers

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
    values = activations.values.astype(np.float64)
    explanations: list[Explanation] = []
    gone: ExplainerError | None = None
    for column in chosen:
        explanation, error = _explain_unit(activations, values, column, explainer, seed, gone)
        gone = error if error is not None and error.lasts else gone
        explanations.append(explanation)
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


def strongest_excerpts(
    pieces: Sequence[str], activations: Floats, count: int = EXCERPTS_SHOWN
) -> tuple[Excerpt, ...]:
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


def _explain_unit(
    activations: UnitActivations,
    values: NDArray[np.float64],
    column: int,
    explainer: Explainer,
    seed: int,
    gone: ExplainerError | None,
) -> tuple[Explanation, ExplainerError | None]:
    """Return the explanation of one unit and the error that it met; `gone`: the explainer is not asked again."""
    unit = activations.units[column]
    half = activations.num_tokens // 2
    pieces, own = activations.pieces[:half], values[:half, column]
    excerpts = strongest_excerpts(pieces, own)
    hypothesis, simulated, error = None, np.zeros(0), gone
    places = np.arange(0)
    notes = [] if gone is None else [str(gone)]
    if activations.num_tokens < FEWEST_TOKENS:
        notes = [_SHORT.format(tokens=activations.num_tokens, fewest=FEWEST_TOKENS)]
    elif gone is None:
        try:
            hypothesis = explainer.explain(Evidence(unit.name, KINDS[activations.kind], pieces, own, excerpts))
            stretches = _held_out(values[half:, column], explainer.window, seed)
            simulated, error = _simulate(explainer, hypothesis, activations.pieces[half:], stretches)
            places = half + np.concatenate(stretches)
        except ExplainerError as failure:
            error = failure
        notes += [] if error is None else [str(error)]
    known = np.isfinite(simulated)
    simulated, places = simulated[known], places[: len(known)][known]
    score = correlation(simulated, values[places, column])
    if len(places) and score is None:
        is_constant = correlation(values[places, column], values[places, column]) is None
        notes.append(_UNDEFINED.format(what="the unit is" if is_constant else "the simulation is"))
    explanation = Explanation(
        unit=unit.name,
        block=unit.block,
        index=unit.index,
        explainer=explainer.name,
        text=None if hypothesis is None else hypothesis.text,
        score=score,
        num_tokens=len(places),
        excerpts=excerpts,
        note="; ".join(notes) or None,
        baseline=None if score is None else _baseline(simulated, values[places], column, seed),
    )
    return explanation, error


def _simulate(
    explainer: Explainer, hypothesis: Hypothesis, pieces: Sequence[str], stretches: list[Integers]
) -> tuple[NDArray[np.float64], ExplainerError | None]:
    """Simulate stretches of a text; those that fail are NaN, and the first error, or one that lasts, is returned."""
    simulated, error = [], None
    for stretch in stretches:
        values = np.full(len(stretch), np.nan)
        if error is None or not error.lasts:
            try:
                values = np.asarray(explainer.simulate(hypothesis, [pieces[token] for token in stretch]), np.float64)
            except ExplainerError as failure:
                error = failure if error is None or failure.lasts else error
        simulated.append(values)
    return np.concatenate(simulated), error


def _held_out(values: Floats, window: int | None, seed: int) -> list[Integers]:
    """Choose the stretches of the held-out text that are simulated; returns the tokens of each, in order."""
    tokens = np.arange(len(values))
    if window is None or len(values) <= window:
        return [tokens]
    stretches = [tokens[first : first + window] for first in range(0, len(values) - window + 1, window)]
    strength = np.array([values[stretch].max() for stretch in stretches])
    order = np.argsort(-strength, kind="stable")
    top, others = order[: EXCERPTS_SCORED // 2], order[EXCERPTS_SCORED // 2 :]
    drawn = np.random.default_rng(seed).permutation(others)[: EXCERPTS_SCORED - len(top)]
    return [stretches[number] for number in sorted([*top.tolist(), *drawn.tolist()])]


def _baseline(simulated: Floats, values: NDArray[np.float64], column: int, seed: int) -> float | None:
    """Return the mean correlation of a simulation with units it is not about; values [held-out tokens, U]."""
    numbers = np.random.default_rng(seed)
    others = np.delete(np.arange(values.shape[1]), column)
    compared = [values[:, other] for other in numbers.permutation(others)[:_OTHERS]]
    if not len(others):
        compared = [numbers.permutation(values[:, column]) for _ in range(_OTHERS)]
    scores = [score for other in compared if (score := correlation(simulated, other)) is not None]
    return float(np.mean(scores)) if scores else None
