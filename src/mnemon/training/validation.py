"""Accuracy on held-out samples at the end of a run.

A question counts as right when greedy decoding would give exactly its answer: every answer token is the likeliest
given the ones before it. That needs one forward pass per batch instead of generation. Published tables come from
`mnemon eval`, which generates; this is the run's own check.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mnemon.data.encoding import IGNORED
from mnemon.training.batches import BatchMaker
from mnemon.training.recipe import Recipe
from mnemon.training.trainer import questions_right

_SEED_OFFSET = 7919


def validate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the held-out accuracy by length and task.

    Args:
        model: trained model, on its device.
        tokenizer: its tokenizer.
        recipe: `evaluation` says which lengths and tasks and how many samples of each.

    Returns:
        length -> task -> {"right", "asked"}; one question per sample, test stories and test background.
    """
    options = recipe.evaluation
    tasks = options.tasks or list(recipe.data.tasks)
    model.eval()
    return {
        str(length): {task: _score(model, tokenizer, recipe, task, length) for task in tasks}
        for length in (options.lengths or recipe.data.lengths)
    }


@torch.no_grad()
def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, task: str, length: int
) -> dict[str, int]:
    data = recipe.data.model_copy(
        update={"tasks": {task: 1.0}, "lengths": [length], "fact_limits": [], "questions_per_story": 1}
    )
    maker = BatchMaker(data, tokenizer, recipe.seed + _SEED_OFFSET, recipe.optimisation.batch_tokens, split="test")
    right: list[bool] = []
    index = 0
    while len(right) < recipe.evaluation.samples:
        right += _answers(model, maker.make(index, stage=0))
        index += 1
    asked = min(len(right), recipe.evaluation.samples)
    return {"right": sum(right[:asked]), "asked": asked}


def _answers(model: PreTrainedModel, batch: dict[str, Any]) -> list[bool]:
    keep = min(batch["keep"], batch["input_ids"].shape[1])
    logits = model(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        logits_to_keep=keep,
        use_cache=False,
    ).logits[:, -keep:-1]
    targets = batch["labels"][:, 1 - keep :].to(model.device)
    asked = targets != IGNORED
    return questions_right(logits[asked].argmax(-1) == targets[asked], batch["question_ids"].to(model.device))
