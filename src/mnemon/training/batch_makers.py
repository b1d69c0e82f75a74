"""Which `BatchMaker` a recipe's data needs."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from mnemon.training.babilong_batches import BabilongBatches
from mnemon.training.batches import BatchMaker
from mnemon.training.data_sections import MqarData, TextData
from mnemon.training.mqar_batches import MqarBatches
from mnemon.training.recipe import Recipe
from mnemon.training.text_batches import TextBatches


def batch_maker(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None, share: tuple[int, int] = (0, 1)
) -> BatchMaker:
    """Return what makes a recipe's training batches.

    Args:
        recipe: of the run; with gradient accumulation a batch is a part of a step.
        tokenizer: of the run; None for data without text.
        share: (rank, number of processes): which rows of a batch to keep, see `share_rows`.
    """
    data, options, segment_length = recipe.data, recipe.optimisation, recipe.segment_length
    parts = options.gradient_accumulation
    sizes = (options.batch_tokens // parts, -(-options.min_rows // parts))
    if isinstance(data, MqarData):
        return MqarBatches(data, recipe.seed, *sizes, share=share, segment_length=segment_length)
    assert tokenizer is not None  # the recipe refuses such data without one
    if isinstance(data, TextData):
        return TextBatches(data, tokenizer, recipe.seed, *sizes, share=share, segment_length=segment_length)
    return BabilongBatches(data, tokenizer, recipe.seed, *sizes, share=share, segment_length=segment_length)
