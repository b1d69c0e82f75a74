"""A language model behind an OpenAI-compatible endpoint as an explainer: a server in the house or a paid service."""

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mnemon.errors import BackendUnavailable, ConfigError
from mnemon.inspection.explain.explainer import Evidence, ExplainerError, Hypothesis
from mnemon.inspection.explain.prompts import (
    explanation_prompt,
    read_explanation,
    read_levels,
    simulation_prompt,
)
from mnemon.inspection.trace import Floats

KEY_VARIABLE = "MNEMON_EXPLAINER_KEY"
"""Environment variable that holds the key. Other programs' variables are not read: their keys are for their servers."""

_RETRIES = 1
_TOKENS_PER_LINE = 16  # of an answer with one line per token
_EXPLANATION_TOKENS = 200


class EndpointExplainer:
    """Explains units with a model that a server offers under `/chat/completions`.

    Args:
        url: address of the interface, such as `http://localhost:8000/v1`.
        model: name of the model there.
        window: tokens simulated with one question, at least 1.
        timeout: seconds to wait for one answer, above 0; asked twice before giving up.

    Raises:
        BackendUnavailable: the package `openai` is not installed.
        ConfigError: the address is none.
    """

    def __init__(self, url: str, model: str, window: int = 64, timeout: float = 60.0) -> None:
        self.name = f"{model} at {_public(url)}"
        try:
            import openai
        except ImportError as error:
            raise BackendUnavailable(
                'an endpoint as explainer needs the package openai: pip install "mnemon[explain]"'
            ) from error
        self.window = window
        self._timeout = timeout
        self._model = model
        self._openai: Any = openai
        self._client: Any = openai.OpenAI(
            base_url=url, api_key=os.environ.get(KEY_VARIABLE) or "none", timeout=timeout, max_retries=_RETRIES
        )

    def explain(self, evidence: Evidence) -> Hypothesis:
        """Ask for an explanation."""
        return read_explanation(self._ask(explanation_prompt(evidence), _EXPLANATION_TOKENS))

    def simulate(self, hypothesis: Hypothesis, pieces: Sequence[str]) -> Floats:
        """Ask for a number from 0 to 10 for every token, all at once."""
        answer = self._ask(simulation_prompt(hypothesis, pieces), _TOKENS_PER_LINE * len(pieces))
        return read_levels(answer, len(pieces))

    def _ask(self, prompt: str, most_tokens: int) -> str:
        """Return the answer to a question.

        Raises:
            ExplainerError: there is none, and why.
        """
        openai = self._openai
        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0.0,
                max_tokens=most_tokens,
            )
            content = completion.choices[0].message.content
        except openai.APITimeoutError:
            raise ExplainerError(f"{self.name} did not answer within {self._timeout:g} s", lasts=True) from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise ExplainerError(f"{self.name} does not answer ({_line(reason)})", lasts=True) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ExplainerError(
                f"{self.name} refused the key ({error.status_code}); set {KEY_VARIABLE}", lasts=True
            ) from None
        except openai.APIStatusError as error:
            raise ExplainerError(
                f"{self.name} answered with an error ({error.status_code}: {_line(error)})", error.status_code == 404
            ) from None
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError):
            raise ExplainerError(f"{self.name} answered something that is no chat completion") from None
        if not isinstance(content, str) or not content.strip():
            raise ExplainerError(f"{self.name} gave an empty answer")
        return content


def _public(url: str) -> str:
    """Return an address without user, password and query: explanations are saved and shown.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(url)
        is_known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_known = False
    if not is_known:
        raise ConfigError(f"expected the address of an endpoint such as http://localhost:8000/v1, got {url!r}")
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 120 else line[:119] + "…"
