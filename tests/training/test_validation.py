from typing import Any

import pytest
import torch

from mnemon.training import validation
from mnemon.training.build import build_model, build_tokenizer
from mnemon.training.recipe_io import check_recipe


def test_texts_of_the_validation_have_the_exact_length_whatever_the_training_varies(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["data"]["length_jitter"] = 0.5
    tiny["evaluation"] = {"lengths": [64], "tasks": ["qa1"], "samples": 40}
    recipe = check_recipe(tiny)
    tokenizer = build_tokenizer(recipe)
    lengths: list[int] = []

    def watched(model: torch.nn.Module, batch: dict[str, Any]) -> list[bool]:
        lengths.extend(batch["attention_mask"].sum(dim=1).tolist())
        return [True] * len(batch["input_ids"])

    monkeypatch.setattr(validation, "_answers", watched)
    assert validation.validate(build_model(recipe, len(tokenizer)), tokenizer, recipe) == {
        "64": {"qa1": {"right": 40, "asked": 40}}
    }
    assert min(lengths) >= 64
    assert max(lengths) - min(lengths) < 4  # questions differ by a word
