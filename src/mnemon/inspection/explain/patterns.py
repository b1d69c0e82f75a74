"""The built-in explainer: which tokens, kinds, places and contexts a unit is active on; no model, no network.

The simulated activation is a sum of tables, one per feature (`mnemon.inspection.explain.features`):

    s_t = sum_f w_f[value of f at token t]

Tables are added one after the other, each fitted to what those before leave over, as means shrunk towards 0
(w = sum of residuals / (count + 2); values seen once get 0). The next one is the table that predicts best in two-fold
cross-validation within the text that explanations are made from, or, of those nearly as good, the one with the fewest
values; when none helps, the explanation is complete. Its words name the strongest entries of each table, so that words
and simulation say the same.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mnemon.inspection.explain.explainer import Evidence, Hypothesis, Pattern
from mnemon.inspection.explain.features import FEATURES, REACH, feature_values, nearby, nearby_word, words
from mnemon.inspection.trace import Floats

_PRIOR = 2.0  # tokens without effect that every value is believed to have been seen on besides
_MOST_TABLES = 4
_LEAST_GAIN = 0.005  # of the error that is left, for one more table
_WEAK = 0.02  # gain of all tables together, of the variance, below which the words say that it is little
_FOLD = 64  # tokens; folds are made of stretches, because neighbours are alike
_NEARLY = 0.9  # of the best table's gain, for a simpler one to be taken
_SHOWN = 5  # values of a table that are named in words
_SHOWN_CONTEXTS = 3  # of several tokens each
_EXAMPLES = 3
_CONTEXTS = ("after2", "after3", "pair")
_LEAST_SHARE = 0.25  # of the strongest entry's evidence, to be named beside it
_MOST_OF_A_KIND = 0.9
_FEWEST_OF_A_KIND = 3

_RELATION = {"pair": "at", "back2": "two tokens after", "back3": "three tokens after"}

Vector = NDArray[np.float64]


class PatternExplainer:
    """Explains units by tables of tokens and contexts."""

    name = "built-in"
    window = None

    def explain(self, evidence: Evidence) -> Hypothesis:
        """Find the tables that predict a unit, and put their strongest entries into words."""
        truth = np.asarray(evidence.activations, dtype=np.float64)
        if truth.std() <= 1e-6 * max(abs(truth).max(), 1e-12):
            return Hypothesis("equally active on every token")
        residual = truth - truth.mean()
        total = float(residual @ residual)
        folds = (np.arange(len(truth)) // _FOLD) % 2 == 0 if len(truth) >= 2 * _FOLD else np.arange(len(truth)) % 2 == 0
        held_out = residual.copy()  # what tables fitted on the other fold leave over
        tables: list[_Table] = []
        candidates = {name: _codes(evidence.pieces, name) for name in FEATURES}
        while len(tables) < _MOST_TABLES:
            found = candidates | _nearest_words(evidence.pieces, residual)
            used = {table.codes.feature for table in tables}
            trials = {
                name: held_out - _cross_fitted(held_out, codes, folds)
                for name, codes in found.items()
                if name not in used
            }
            before = float(held_out @ held_out)
            gains = {name: before - float(left @ left) for name, left in trials.items()}
            best = max(gains.values())
            if tables and best < _LEAST_GAIN * before:
                break
            nearly = [name for name, gain in gains.items() if gain >= min(_NEARLY * best, best)]
            name = min(nearly, key=lambda one: len(found[one].names))
            table = _Table.fit(found[name], residual)
            tables.append(table)
            residual, held_out = residual - table.predicted, trials[name]
        explained = 1 - float(held_out @ held_out) / total
        return Hypothesis(_sentence(tables, evidence, explained), tuple(table.pattern for table in tables))

    def simulate(self, hypothesis: Hypothesis, pieces: Sequence[str]) -> Floats:
        """Add up what the tables say of each token."""
        simulated = np.zeros(len(pieces))
        for pattern in hypothesis.patterns:
            weights = pattern.weights
            simulated += [weights.get(value, 0.0) for value in feature_values(pieces, pattern.feature)]
        return simulated


@dataclass(frozen=True)
class _Codes:
    """The values of a feature as numbers: `names[codes[t]]` is the value at token t; it occurs `counts` times."""

    feature: str
    names: tuple[str, ...]
    codes: NDArray[np.intp]
    counts: Vector

    def means(self, residual: Vector, chosen: NDArray[np.bool_] | None = None) -> Vector:
        """Return the shrunk mean of a residual for every value, over all or the chosen tokens."""
        codes, counts = self.codes, self.counts
        if chosen is not None:
            codes, residual = codes[chosen], residual[chosen]
            counts = np.bincount(codes, minlength=len(self.names)).astype(np.float64)
        sums = np.bincount(codes, weights=residual, minlength=len(self.names))
        return np.where(counts >= 2, sums / (counts + _PRIOR), 0.0)


@functools.lru_cache(maxsize=32)  # the units of a text share its features
def _codes(pieces: tuple[str, ...], feature: str) -> _Codes:
    """Number the values of a feature in the order in which they come."""
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(value, len(numbers)) for value in feature_values(pieces, feature)]
    array = np.array(codes, dtype=np.intp)
    return _Codes(feature, tuple(numbers), array, np.bincount(array).astype(np.float64))


@dataclass(frozen=True)
class _Table:
    """A fitted table: a weight for every value."""

    codes: _Codes
    weights: Vector

    @classmethod
    def fit(cls, codes: _Codes, residual: Vector) -> "_Table":
        """Weigh every value with the mean of what is still unexplained, [T], where the feature has it."""
        return cls(codes, codes.means(residual))

    @property
    def predicted(self) -> Vector:
        """What the table says of every token it was fitted on."""
        return self.weights[self.codes.codes]

    @property
    def pattern(self) -> Pattern:
        """The table without its zeros."""
        named = zip(self.codes.names, self.weights, strict=True)
        return Pattern(self.codes.feature, {name: float(weight) for name, weight in named if weight != 0})

    @property
    def strongest(self) -> list[int]:
        """Numbers of the values that raise the activation most clearly, the clearest first."""
        clarity = self.weights * np.sqrt(self.codes.counts)
        most = _SHOWN_CONTEXTS if self.codes.feature in _CONTEXTS else _SHOWN
        order = [int(number) for number in np.argsort(-clarity, kind="stable")[:most]]
        return [number for number in order if clarity[number] > 0 and clarity[number] >= _LEAST_SHARE * clarity.max()]


def _cross_fitted(residual: Vector, codes: _Codes, folds: NDArray[np.bool_]) -> Vector:
    """Return what a table says of every token when it is fitted on the other fold alone."""
    return np.where(folds, codes.means(residual, ~folds)[codes.codes], codes.means(residual, folds)[codes.codes])


def _nearest_words(pieces: tuple[str, ...], residual: Vector) -> dict[str, _Codes]:
    """Return the feature of being near a word, for the word that it seems to tell most about."""
    tokens = _codes(pieces, "token")
    sums = np.concatenate([[0.0], np.cumsum(residual)])
    ends = np.minimum(np.arange(len(residual)) + 1 + REACH, len(residual))
    following = sums[ends] - sums[1:]
    gains = np.bincount(tokens.codes, weights=following) ** 2 / (tokens.counts + _PRIOR)
    feature = nearby(tokens.names[int(gains.argmax())])
    return {feature: _codes(pieces, feature)}


def _sentence(tables: list[_Table], evidence: Evidence, explained: float) -> str:
    said = [phrase for table in tables if (phrase := _phrase(table, evidence))]
    sentence = "; also ".join(said) if said else "less on some tokens than on most"
    return f"hardly predictable from tokens and contexts; most {sentence}" if explained < _WEAK else sentence


def _phrase(table: _Table, evidence: Evidence) -> str:
    """Say what a table is about; empty if it only lowers the activation."""
    values = [table.codes.names[number] for number in table.strongest]
    if not values:
        return ""
    feature = table.codes.feature
    if (word := nearby_word(feature)) is not None:
        return f"{f'within {REACH} tokens after' if values[0] == 'yes' else 'away from'} {_quoted([word])}"
    if feature == "kind":
        return f"on {_listed([_with_examples(value, evidence) for value in values])}"
    if feature == "place":
        return f"on token{'s' if len(values) > 1 else ''} {_listed(values)} of a sentence"
    if feature == "token":
        return f"on {_kind_of(table, evidence)}{_quoted(values)}"
    return f"{_RELATION.get(feature, 'after')} {_quoted(values)}"


def _kind_of(table: _Table, evidence: Evidence) -> str:
    """Say what the tokens that raise the activation have in common: "capitalised words such as ", or nothing."""
    raising = table.weights >= table.weights.max() / 2
    if raising.sum() < _FEWEST_OF_A_KIND:
        return ""
    kinds = np.array(feature_values(evidence.pieces, "kind"))
    own = kinds[raising[table.codes.codes]]
    names, counts = np.unique(own, return_counts=True)
    share = counts.max() / len(own)
    common = str(names[counts.argmax()])
    # Where most tokens of a text are words in lower case, that is nothing to have in common.
    is_special = float((kinds == common).mean()) < share / 2
    return f"{common} such as " if share >= _MOST_OF_A_KIND and is_special else ""


def _with_examples(kind: str, evidence: Evidence) -> str:
    """Name a kind of token with its most frequent ones."""
    kinds = feature_values(evidence.pieces, "kind")
    own = (text for text, one in zip(words(evidence.pieces), kinds, strict=True) if one == kind)
    return f"{kind} such as {_quoted([text for text, _ in Counter(own).most_common(_EXAMPLES)])}"


def _quoted(values: list[str]) -> str:
    return _listed([f"“{value}”" for value in values])


def _listed(values: list[str]) -> str:
    return " and ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)
