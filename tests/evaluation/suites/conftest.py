"""Tiny models with one tokenizer in float64, and a folder of saved ones for whole command lines."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mnemon.evaluation.controls import ModelSpec
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.modeling_mom import MoMForCausalLM


@pytest.fixture(scope="session")
def mom(plain: Any) -> Any:
    torch.manual_seed(3)
    sizes = {"num_memories": 3, "top_k": 2, "num_heads": 2, "head_dim": 8}
    config = MoMConfig(base_config=plain.config, capacity=0.6, initial_output=1.0, **sizes)
    return MoMForCausalLM(config).eval()


@pytest.fixture(params=["plain", "lm2", "mom"])
def spec(request: pytest.FixtureRequest, tokenizer: Any) -> ModelSpec:
    """One model of every kind, in float64 so that rounding cannot hide a difference."""
    model = request.getfixturevalue(request.param)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return ModelSpec(request.param, copy.double().eval(), tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, lm2: Any, plain: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("tiny-lm2", lm2), ("tiny-plain", plain)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "tiny-plain" / "recipe.yaml").write_text("data: {tasks: [qa1]}\nevaluation: {layout: short}\n")
    plain.save_pretrained(folder / "no-tokenizer")
    return folder
