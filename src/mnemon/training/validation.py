"""What a model can do on held-out samples at the end of a run.

BABILong: a question counts as right when greedy decoding would give exactly its answer: every answer token is the
likeliest given the ones before it. That needs one forward pass per batch instead of generation. Published tables come
from `mnemon eval`, which generates; this is the run's own check. MQAR and text are measured exactly as `mnemon eval`
measures them (`mnemon.metrics`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mnemon.data.encoding import IGNORED
from mnemon.metrics.mqar import held_out_samples, queries_right, recall_row
from mnemon.metrics.perplexity import FACTORS, held_out_windows, measure_perplexity
from mnemon.training.babilong_batches import BabilongBatches
from mnemon.training.data_sections import BabilongData, MqarData, TextData
from mnemon.training.recipe import Recipe
from mnemon.training.trainer import questions_right

_SEED_OFFSET = 7919

Table = dict[str, dict[str, dict[str, Any]]]
"""length -> what was measured -> its numbers."""


def validate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, recipe: Recipe) -> Table:
    """Measure a model on held-out samples.

    Args:
        model: trained model, on its device.
        tokenizer: its tokenizer; None for data without text.
        recipe: `evaluation` says what is measured and on how many samples.

    Returns:
        For BABILong length -> task -> {"right", "asked"}: one question per sample, test stories and test background.
        For MQAR length -> pairs -> `mnemon.metrics.mqar.recall_row`. For text length -> "text" ->
        `mnemon.metrics.perplexity.perplexity_row`.
    """
    model.eval()
    data = recipe.data
    if isinstance(data, MqarData):
        return _recall(model, data, recipe)
    assert tokenizer is not None  # the recipe refuses such data without one
    if isinstance(data, TextData):
        return _perplexity(model, tokenizer, data, recipe)
    tasks = recipe.evaluation.tasks or list(data.tasks)
    return {
        str(length): {task: _score(model, tokenizer, data, recipe, task, length) for task in tasks}
        for length in (recipe.evaluation.lengths or data.lengths)
    }


def _recall(model: PreTrainedModel, data: MqarData, recipe: Recipe) -> Table:
    table: Table = {}
    for part in recipe.evaluation.slices or data.slices:
        samples = held_out_samples(data.settings(part), recipe.evaluation.samples, recipe.seed)
        table.setdefault(str(part.length), {})[part.name] = recall_row(samples, queries_right(model, samples))
    return table


def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: TextData, recipe: Recipe) -> Table:
    lengths = recipe.evaluation.lengths or [factor * data.length for factor in FACTORS]
    windows = held_out_windows(data.background, tokenizer, lengths, recipe.evaluation.samples)
    return {str(length): {"text": measure_perplexity(model, windows, length)} for length in lengths}


@torch.no_grad()
def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    trained: BabilongData,
    recipe: Recipe,
    task: str,
    length: int,
) -> dict[str, int]:
    exactly = {
        "tasks": {task: 1.0},
        "lengths": [length],
        "fact_limits": [],
        "length_jitter": 0.0,
        "share_names": False,
    }
    data = trained.model_copy(update={**exactly, "questions_per_story": 1})
    options = recipe.optimisation
    rows = min(options.min_rows, recipe.evaluation.samples)
    maker = BabilongBatches(data, tokenizer, recipe.seed + _SEED_OFFSET, options.batch_tokens, rows, split="test")
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
