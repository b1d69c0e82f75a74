"""Training RMT and ARMT from recipes: what is built, what the log and the card say, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from mnemon.errors import ConfigError
from mnemon.models.modeling_rmt import RMTForCausalLM
from mnemon.training import load_recipe, plan, train
from mnemon.training.build import build_model, count_parameters
from mnemon.training.recipe_io import check_recipe

KINDS: dict[str, dict[str, Any]] = {
    "rmt": {"num_memory_tokens": 3, "segment_length": 32},
    "armt": {"memory": "associative", "num_memory_tokens": 3, "segment_length": 32, "key_dim": 4},
}


@pytest.fixture(params=KINDS)
def rmt(request: pytest.FixtureRequest, tiny: dict[str, Any]) -> dict[str, Any]:
    """Return a raw recipe of either kind of memory around a tiny LFM2."""
    tiny["model"].update(kind="rmt", rmt=dict(KINDS[request.param]))
    return tiny


def test_every_option_of_the_recipe_reaches_the_model(tiny: dict[str, Any]) -> None:
    options = {
        "memory": "associative", "num_memory_tokens": 5, "segment_length": 24, "key_dim": 6, "feature_order": 2,
        "bptt_segments": 3, "blocks_path": "model.layers", "attention_name": "self_attn",
    }  # fmt: skip
    tiny["model"].update(kind="rmt", rmt=options)
    recipe = check_recipe(tiny)
    model = build_model(recipe, 420)
    assert isinstance(model, RMTForCausalLM)
    assert {name: getattr(model.config, name) for name in options} == options
    assert recipe.segment_length == 24


@pytest.mark.parametrize("kind", KINDS)
def test_a_pretrained_decoder_takes_memory_tokens(kind: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    build_model(check_recipe(tiny), 420).save_pretrained(tmp_path)
    tiny["model"] = {"kind": "rmt", "from_base": str(tmp_path), "rmt": KINDS[kind]}
    model = build_model(check_recipe(tiny), 420)
    assert isinstance(model, RMTForCausalLM)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_writes_log_card_and_model(rmt: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = train(check_recipe(rmt), folder, show_progress=False)
    assert 0 < summary["parameters"]["memory"] < summary["parameters"]["total"]
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    changes = [entry["memory/memory_change"] for entry in entries if "memory/memory_change" in entry]
    assert changes
    assert all(change > 0 for change in changes)
    card = (folder / "README.md").read_text()
    assert "with 3 memory tokens per segment of 32" in card
    assert ("(ARMT)" in card) == (rmt["model"]["rmt"].get("memory") == "associative")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert count_parameters(model) == summary["parameters"]


def test_truncation_and_recomputing_train_too(rmt: dict[str, Any], tmp_path: Path) -> None:
    rmt["model"]["rmt"]["bptt_segments"] = 1
    rmt["optimisation"] |= {"gradient_checkpointing": True, "max_tokens": 1500}
    assert train(check_recipe(rmt), tmp_path / "run", show_progress=False)["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"kind": "rmt"}, "kind: rmt needs an rmt section"),
        ({"kind": "plain", "rmt": {}}, "kind: plain takes no rmt options"),
        ({"kind": "rmt", "rmt": {}, "lm2": {}}, "kind: rmt takes no lm2 options"),
        ({"kind": "rmt", "rmt": {}, "mom": {}}, "kind: rmt takes no mom options"),
        ({"kind": "rmt", "rmt": {"num_memory_token": 3}}, "did you mean model.rmt.num_memory_tokens"),
        ({"kind": "rmt", "rmt": {"memory": "slots"}}, "model.rmt.memory"),
        (
            {"kind": "rmt", "rmt": {}, "base": None, "from_base": "some/decoder", "freeze_base": True},
            "freeze_base saves the memory alone, which kind: lm2 alone can",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(tiny: dict[str, Any], model: dict[str, Any], said: str) -> None:
    tiny["model"].update(model)
    with pytest.raises(ConfigError, match=said) as caught:
        check_recipe(tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_shipped_recipes_are_comparable_with_that_of_lm2(size: str) -> None:
    recipes = {kind: load_recipe(f"babilong-{size}-{kind}") for kind in ("lm2", "rmt", "armt")}
    totals = {kind: plan(recipe)["parameters"]["total"] for kind, recipe in recipes.items()}
    assert max(totals.values()) <= 1.02 * min(totals.values()), totals
    lm2 = recipes["lm2"]
    assert lm2.model.base is not None
    for recipe in recipes.values():
        for section in ("seed", "tokenizer", "data", "evaluation", "segment_length"):
            assert getattr(recipe, section) == getattr(lm2, section)
        # The size of the steps is tuned per model, as a learning rate would be (docs/experiments.md); tokens are equal.
        steps = lm2.optimisation.model_dump(include={"batch_tokens", "min_rows"})
        assert recipe.optimisation.model_copy(update=steps) == lm2.optimisation
        assert recipe.model.base is not None
        same = recipe.model.base | {"intermediate_size": lm2.model.base["intermediate_size"]}
        assert same == lm2.model.base
