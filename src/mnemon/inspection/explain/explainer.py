"""What an explainer is asked, what it answers, and how it fails.

Explaining has three steps: an explainer says in words what makes a unit active, having seen one part of a text; from
these words it simulates how active the unit is on another part; how well that agrees with the truth is the score.

Source: Language models can explain neurons in language models, Bills et al. 2023, OpenAI,
openaipublic.blob.core.windows.net/neuron-explainer/paper; applied to memory slots in LM2: Large Memory
Models, arXiv:2502.06049.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mnemon.errors import MnemonError
from mnemon.inspection.trace import Excerpt, Floats


class ExplainerError(MnemonError, RuntimeError):
    """An explainer could not answer; the message, one line, becomes the explanation's note.

    Args:
        message: what happened and what to do.
        lasts: whether the next question would fail in the same way (nobody answers, the key is refused).
    """

    def __init__(self, message: str, lasts: bool = False) -> None:
        super().__init__(message)
        self.lasts = lasts


@dataclass(frozen=True)
class Evidence:
    """What an explainer is shown of a unit.

    Attributes:
        unit: its name.
        meaning: what its activations are, in words.
        pieces: texts of the tokens of the part of the text that explanations are made from, T of them.
        activations: how active the unit was on them, [T].
        excerpts: where in it the unit is most active, the strongest first.
    """

    unit: str
    meaning: str
    pieces: tuple[str, ...]
    activations: Floats
    excerpts: tuple[Excerpt, ...]


@dataclass(frozen=True)
class Pattern:
    """What one property of a token adds to the simulated activation.

    Attributes:
        feature: name of the property (`mnemon.inspection.explain.features`).
        weights: what is added, by the property's value; nothing for other values.
    """

    feature: str
    weights: dict[str, float]


@dataclass(frozen=True)
class Hypothesis:
    """An explanation before it is tested.

    Attributes:
        text: the explanation.
        patterns: its structured form, where the explainer has one.
    """

    text: str
    patterns: tuple[Pattern, ...] = ()


class Explainer(Protocol):
    """Explains units and simulates them."""

    @property
    def name(self) -> str:
        """Who explains, for the reader of the explanation."""

    @property
    def window(self) -> int | None:
        """Tokens that are simulated at a time, in excerpts of the held-out text; None = all of it at once."""

    def explain(self, evidence: Evidence) -> Hypothesis:
        """Say what makes a unit active.

        Raises:
            ExplainerError: it cannot.
        """

    def simulate(self, hypothesis: Hypothesis, pieces: Sequence[str]) -> Floats:
        """Predict how active the unit is on the tokens of another text, in any unit and from any zero, [T].

        NaN where there is no prediction.

        Raises:
            ExplainerError: it cannot.
        """
