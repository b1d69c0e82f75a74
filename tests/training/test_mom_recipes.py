"""Training mixtures of memories from recipes: what is built, what the log and the card say, what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mnemon.errors import ConfigError
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.modeling_mom import MoMForCausalLM
from mnemon.training import train
from mnemon.training.build import build_model, count_parameters
from mnemon.training.recipe_io import check_recipe

MOM = {"num_heads": 2, "head_dim": 8, "num_memories": 3, "top_k": 2}
LM2 = {"num_slots": 4, "slot_dim": 16, "num_memory_heads": 2, "segment_length": 32}


@pytest.fixture
def mom(tiny: dict[str, Any]) -> dict[str, Any]:
    """Return a raw recipe of a mixture in the place of the one attention of a tiny LFM2."""
    tiny["model"].update(kind="mom", mom=dict(MOM))
    return tiny


def test_every_option_of_the_recipe_reaches_the_model(mom: dict[str, Any]) -> None:
    options = {
        "rule": "gla", "num_memories": 5, "top_k": 1, "shared_memory": False, "num_heads": 3, "head_dim": 6,
        "value_dim": 10, "conv_size": 2, "single_kv_proj": True, "capacity": 0.5, "balance_loss": "layer",
        "balance_weight": 0.5, "norm_eps": 1e-3, "output_gate": False, "dispatch": "dense", "form": "recurrent",
        "initial_output": 0.5,
    }  # fmt: skip
    mom["model"]["mom"] = options
    model = build_model(check_recipe(mom), 420)
    assert isinstance(model, MoMForCausalLM)
    assert {name: getattr(model.config, name) for name in options} == options


def test_a_bank_goes_on_top_of_memories(mom: dict[str, Any]) -> None:
    mom["model"].update(kind="lm2", lm2=LM2)
    model = build_model(check_recipe(mom), 420)
    assert isinstance(model, LM2ForCausalLM)
    assert isinstance(model.base, MoMForCausalLM)
    assert model.balance_weight == 0.01
    assert model(torch.arange(1, 70)[None]).logits.isfinite().all()


def test_parameters_are_counted_in_total_and_active(mom: dict[str, Any]) -> None:
    model = build_model(check_recipe(mom), 420)
    counts = count_parameters(model)
    width, keys = 32, 16
    # Of three routed memories one is idle: its projections to keys, values, decay and write strength.
    assert counts["total"] - counts["active"] == width * (keys + keys + 2 + 2)
    assert 0 < counts["memory"] < counts["total"]
    plain = copy.deepcopy(mom)
    plain["model"].update(kind="plain", mom=None)
    counts = count_parameters(build_model(check_recipe(plain), 420))
    assert counts["total"] == counts["active"]


def test_a_run_logs_how_memories_are_used_and_its_card_names_them(mom: dict[str, Any], tmp_path: Path) -> None:
    summary = train(check_recipe(mom), tmp_path / "run", show_progress=False)
    assert summary["parameters"]["active"] < summary["parameters"]["total"]
    entries = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert all(entry["memory/balance_loss"] >= 1.5 for entry in entries)  # 2 when balanced, with top-2
    assert all(1 / 3 <= entry["memory/largest_load"] <= 1 for entry in entries)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "3 memories of the rule gated_delta_net, 2 of them per token, and a shared one" in card
    assert "active for one token" in card


def test_the_balance_loss_moves_the_router(mom: dict[str, Any], tmp_path: Path) -> None:
    weights = []
    for weight in (0.0, 10.0):
        mom["model"]["mom"]["balance_weight"] = weight
        folder = tmp_path / str(weight)
        train(check_recipe(mom), folder, show_progress=False)
        weights.append(
            load_file(folder / "model.safetensors")["base.model.layers.1.self_attn.layer.router.logits.weight"]
        )
        entry = json.loads((folder / "training_log.jsonl").read_text().splitlines()[-1])
        assert ("memory/balance_loss" in entry) is (weight > 0)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("kind", ["mom", "both"])
def test_a_resumed_run_ends_with_the_same_bits(mom: dict[str, Any], tmp_path: Path, kind: str) -> None:
    if kind == "both":
        mom["model"].update(kind="lm2", lm2=LM2)
    mom["optimisation"]["schedule"] = "constant"
    train(check_recipe(mom), tmp_path / "whole", show_progress=False)
    tokens = mom["optimisation"]["max_tokens"]
    mom["optimisation"]["max_tokens"] = tokens // 2
    train(check_recipe(mom), tmp_path / "half", show_progress=False)
    mom["optimisation"]["max_tokens"] = tokens
    train(check_recipe(mom), tmp_path / "half", resume=True, show_progress=False)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[name], half[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "plain"}, "kind: plain takes no mom options"),
        ({"mom": None}, "kind: mom needs a mom section"),
        ({"lm2": LM2}, "kind: mom takes no lm2 options"),
        ({"base": None, "from_base": "somewhere"}, "mom options build new memories and need base"),
        ({"mom": {**MOM, "top_k": 4}}, "top_k=4 exceeds num_memories=3"),
        ({"mom": {**MOM, "rule": "glaa"}}, "did you mean 'gla'"),
        ({"mom": {**MOM, "layer_types": ["mom"]}}, "layer_types names 1 blocks, the base has 2"),
        ({"mom": {**MOM, "layer_types": ["mom", "mom"]}}, "block 0 of Lfm2ForCausalLM has no attention"),
        ({"mom": {**MOM, "capacity": 0}}, "capacity"),
        ({"mom": {**MOM, "num_memory": 3}}, "did you mean model.mom.num_memories"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(
    mom: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    mom["model"].update(changes)
    with pytest.raises(ConfigError, match=said):
        train(check_recipe(mom), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run" / "model.safetensors").exists()
