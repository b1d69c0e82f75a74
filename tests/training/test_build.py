from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mnemon.errors import CheckpointError, ConfigError
from mnemon.training import load_recipe, plan, shipped_recipes
from mnemon.training.build import build_model, build_tokenizer, vocabulary_size
from mnemon.training.recipe_io import check_recipe


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_compared_recipes_have_equal_parameter_counts_and_all_else_but_the_size_of_steps_equal(size: str) -> None:
    recipes = {kind: load_recipe(f"babilong-{size}-{kind}") for kind in ("lm2", "plain", "window")}
    totals = {kind: plan(recipe)["parameters"]["total"] for kind, recipe in recipes.items()}
    assert max(totals.values()) <= 1.02 * min(totals.values()), totals
    lm2 = recipes["lm2"]
    for recipe in recipes.values():
        for section in ("seed", "tokenizer", "data", "evaluation"):
            assert getattr(recipe, section) == getattr(lm2, section)
        # The size of the steps is tuned per model, as a learning rate would be (docs/experiments.md); tokens are equal.
        steps = lm2.optimisation.model_dump(include={"batch_tokens", "min_rows"})
        assert recipe.optimisation.model_copy(update=steps) == lm2.optimisation
    assert lm2.model.lm2 is not None
    assert recipes["window"].model.lm2 is not None
    assert recipes["window"].model.lm2.memory_layers == []
    assert recipes["window"].model.lm2.attention_span == lm2.model.lm2.attention_span


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if "small" not in name])
def test_every_small_enough_shipped_recipe_builds_a_model_that_runs(name: str) -> None:
    recipe = load_recipe(name)
    model = build_model(recipe, vocabulary_size(recipe, None))
    assert model(input_ids=torch.arange(10)[None], logits_to_keep=1).logits.isfinite().all()


def test_weights_come_from_the_seed_alone_and_leave_the_global_generator(tiny: dict[str, Any]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(check_recipe(tiny), 420).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = build_model(check_recipe(tiny), 420).state_dict()
    other = build_model(check_recipe({**tiny, "seed": 4}), 420).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hiden_size", 32, "unknown key model.base.hiden_size for lfm2; did you mean hidden_size"),
        ("model_type", "llamma", "Hugging Face has no 'llamma'; did you mean llama"),
        ("vocab_size", 100, "model.base.vocab_size comes from the tokenizer"),
        ("hidden_size", "wide", "model.base: lfm2 refuses it"),
    ],
)
def test_a_wrong_base_is_refused_in_one_line(tiny: dict[str, Any], key: str, value: Any, said: str) -> None:
    tiny["model"]["base"][key] = value
    with pytest.raises(ConfigError, match=said):
        build_model(check_recipe(tiny), 420)


def test_a_missing_tokenizer_is_named(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["tokenizer"]["path"] = str(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer in"):
        build_tokenizer(check_recipe(tiny))
    tiny["tokenizer"]["path"] = "nowhere"
    with pytest.raises(ConfigError, match="neither a folder nor a shipped checkpoint"):
        build_tokenizer(check_recipe(tiny))


def test_training_can_start_from_the_weights_of_a_checkpoint(tiny: dict[str, Any], tmp_path: Path) -> None:
    source = build_model(check_recipe(tiny), 420)
    source.save_pretrained(tmp_path)
    tiny["model"]["init_from"] = str(tmp_path)
    started = build_model(check_recipe({**tiny, "seed": 9}), 420)
    wanted = source.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in started.state_dict().items())


@pytest.mark.parametrize("fault", ["missing", "extra", "mis-shaped", "cannot be read"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_tensor_name(
    tiny: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    build_model(check_recipe(tiny), 420).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.ffn_norm.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["memory.new"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(5)
    save_file(tensors, path, metadata={"format": "pt"})
    if fault == "cannot be read":
        path.write_bytes(path.read_bytes()[:1000])
    tiny["model"]["init_from"] = str(tmp_path)
    with pytest.raises(CheckpointError, match=fault):
        build_model(check_recipe(tiny), 420)


def test_the_recipe_of_the_papers_size_has_the_papers_parameters() -> None:
    counts = plan(load_recipe("lm2-1.7b"))["parameters"]
    width, blocks = 2048, 16
    assert counts["total"] - counts["memory"] == 1_235_814_400  # Llama-3.2-1B
    matrices = 11 * width * width * blocks
    # Besides the matrices: three gate biases and a norm of the model width, and a slope per head, in every block.
    assert counts["memory"] == matrices + blocks * (3 * width + width + 8)
    assert round(counts["memory"] / 1e9, 2) == 0.74
