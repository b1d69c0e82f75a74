"""A language model on this machine as an explainer."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mnemon.inspection.explain.explainer import Evidence, ExplainerError, Hypothesis
from mnemon.inspection.explain.prompts import digit_prompt, explanation_prompt, read_explanation, shown
from mnemon.inspection.trace import Floats
from mnemon.models.loading import load_model

_NEW_TOKENS = 60
_DIGITS = 10


class LocalExplainer:
    """Explains units with a causal language model of Hugging Face.

    An explanation is generated greedily. A simulation is one pass over "token, tab, unknown" lines: the activation is
    the expectation over the ten digits at the place behind each tab, so nothing has to be generated.

    Args:
        name: folder or name of the model (`mnemon.models.loading.load_model`).
        window: tokens simulated in one pass, at least 1.
        device: where the model runs.

    Raises:
        CheckpointError: there is no such model, or its files are damaged.

    Source:
        Language models can explain neurons in language models, Bills et al. 2023: simulation "all at once".
    """

    def __init__(self, name: str, window: int = 64, device: str = "cpu") -> None:
        model, tokenizer = load_model(name, device=device)
        self.name = name
        self.window = window
        self.model: Any = model
        self.tokenizer: Any = tokenizer

    def explain(self, evidence: Evidence) -> Hypothesis:
        """Generate an explanation."""
        ids = self._ids(self._asked(explanation_prompt(evidence)))
        self._check_length(len(ids) + _NEW_TOKENS)
        inputs = torch.tensor([ids], device=self.model.device)
        with self._running():
            output = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return read_explanation(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    def simulate(self, hypothesis: Hypothesis, pieces: Sequence[str]) -> Floats:
        """Return the expected digit behind every token."""
        digits = self._digits()
        ids = self._ids(digit_prompt(hypothesis))
        tab, unknown = self._part("\t"), self._part("unknown\n")
        places = []
        for piece in pieces:
            ids += self._part(shown(piece)) + tab
            places.append(len(ids) - 1)
            ids += unknown
        self._check_length(len(ids))
        logits = self._logits(torch.tensor([ids], device=self.model.device), places)[:, digits]
        shares = logits.double().softmax(dim=-1)
        expected = shares @ torch.arange(_DIGITS, dtype=torch.float64, device=shares.device)
        values: Floats = expected.cpu().numpy()
        return values

    def _asked(self, prompt: str) -> str:
        """Put a question the way the model was trained to be asked."""
        if self.tokenizer.chat_template is None:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def _ids(self, text: str) -> list[int]:
        # A chat template has put the special tokens in already.
        return list(self.tokenizer(text, add_special_tokens=self.tokenizer.chat_template is None)["input_ids"])

    def _part(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _digits(self) -> list[int]:
        """Return the ids of the ten digits: each the last token of a digit's text, before which some put a space."""
        ids = [self._part(str(digit))[-1] for digit in range(_DIGITS)]
        if len(set(ids)) < _DIGITS:
            raise ExplainerError(
                f"the tokenizer of {self.name} does not tell digits apart; use another explainer", True
            )
        return ids

    def _check_length(self, length: int) -> None:
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise ExplainerError(
                f"{self.name} takes {longest} tokens and is asked about {length}; use another explainer", True
            )

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Run without gradients; what a model cannot do is no reason to lose what others found."""
        try:
            with torch.no_grad():
                yield
        except (RuntimeError, ValueError, IndexError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ExplainerError(f"{self.name} failed: {reason}") from error

    def _logits(self, ids: Tensor, places: list[int]) -> Tensor:
        """Return the logits at some places, [places, vocabulary]; the rest are not computed where that is possible."""
        with self._running():
            if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
                kept = torch.tensor(places, device=ids.device)
                return self.model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits[0]
            return self.model(input_ids=ids, use_cache=False).logits[0, places]
