"""Runs on a pretrained decoder: the memory alone trained and saved as an adapter, or everything trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemon.errors import CheckpointError, ConfigError
from mnemon.models.base_model import fingerprint
from mnemon.models.loading import load_model
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.training import plan, train
from mnemon.training.build import build_model, build_tokenizer, count_parameters
from mnemon.training.recipe_io import check_recipe
from mnemon.training.trainer import AnswerTrainer

LM2 = {"num_slots": 4, "slot_dim": 16, "num_memory_heads": 2, "segment_length": 32, "attention_span": 32}


@pytest.fixture(scope="session")
def base(tiny_base: dict[str, Any], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved plain decoder with its tokenizer; do not change it."""
    folder = tmp_path_factory.mktemp("pretrained") / "base"
    recipe = check_recipe(tiny_base)
    tokenizer = build_tokenizer(recipe)
    build_model(recipe, len(tokenizer), tokenizer).save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def frozen(tiny: dict[str, Any], base: Path) -> dict[str, Any]:
    """The tiny recipe, training a memory on the saved decoder."""
    tiny["model"] = {"kind": "lm2", "from_base": str(base), "freeze_base": True, "lm2": LM2}
    del tiny["tokenizer"]
    return tiny


def run(raw: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    return train(check_recipe(raw), folder, show_progress=False, **options)


def test_a_frozen_run_ends_as_an_adapter_that_loads_by_name(frozen: dict[str, Any], base: Path, tmp_path: Path) -> None:
    summary = run(frozen, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"adapter_config.json", "memory.safetensors", "tokenizer.json", "README.md", "summary.json"}
    assert not names & {"config.json", "model.safetensors"}
    model, tokenizer = load_model(str(tmp_path / "run"))
    assert isinstance(model, LM2ForCausalLM)
    assert fingerprint(model.base) == fingerprint(AutoModelForCausalLM.from_pretrained(base))
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    last = load_file(newest / "model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in model.state_dict().items() if "memory." in name)
    counts = summary["parameters"]
    assert counts["trainable"] == counts["memory"] < counts["total"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"{counts['memory']:,} parameters" in card
    assert "from_adapter" in card
    assert "license" not in card


def test_the_optimiser_holds_the_memory_alone(
    frozen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[int], set[int]]] = []
    original = AnswerTrainer.create_scheduler

    def spy(self: AnswerTrainer, *args: Any, **kwargs: Any) -> Any:
        assert self.optimizer is not None
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        seen.append((held, {id(p) for p in self.network.memory.parameters()}))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "create_scheduler", spy)
    run(frozen, tmp_path / "run")
    assert seen
    assert all(held == memory for held, memory in seen)


def test_a_frozen_run_that_was_cut_ends_with_the_same_bits(frozen: dict[str, Any], tmp_path: Path) -> None:
    options = frozen["optimisation"]
    options["schedule"] = "constant"
    whole = run(frozen, tmp_path / "whole")
    run(frozen | {"optimisation": options | {"max_tokens": options["max_tokens"] // 2}}, tmp_path / "cut")
    resumed = run(frozen, tmp_path / "cut", resume=True)
    assert resumed["steps"] == whole["steps"]
    first, second = (load_file(tmp_path / name / "memory.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_model(str(tmp_path / "cut"))[0].config.num_slots == LM2["num_slots"]


def test_a_run_does_not_go_on_when_its_base_was_exchanged(frozen: dict[str, Any], base: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(base, tmp_path / "base")
    frozen["model"]["from_base"] = str(mine)
    run(frozen, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(mine)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    model.save_pretrained(mine)
    with pytest.raises(ConfigError, match=r"another model than when the run began \(fingerprint"):
        run(frozen, tmp_path / "run", resume=True)


@pytest.mark.parametrize("kind", ["lm2", "plain"])
def test_a_pretrained_decoder_can_train_as_a_whole(
    frozen: dict[str, Any], base: Path, tmp_path: Path, kind: str
) -> None:
    frozen["model"] = {"kind": kind, "from_base": str(base)} | ({"lm2": LM2} if kind == "lm2" else {})
    summary = run(frozen, tmp_path / "run")
    assert summary["parameters"]["trainable"] == summary["parameters"]["total"]
    trained = load_model(str(tmp_path / "run"))[0]
    decoder = trained.base if kind == "lm2" else trained
    assert fingerprint(decoder) != fingerprint(AutoModelForCausalLM.from_pretrained(base))


def test_building_takes_the_pretrained_weights_and_draws_the_memory_from_the_seed(
    frozen: dict[str, Any], base: Path
) -> None:
    recipe = check_recipe(frozen)
    first, again = build_model(recipe, 300), build_model(recipe, 300)
    other = build_model(check_recipe({**frozen, "seed": 4}), 300)
    assert isinstance(first, LM2ForCausalLM)
    assert fingerprint(first.base) == fingerprint(AutoModelForCausalLM.from_pretrained(base))
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    assert plan(recipe)["parameters"] == count_parameters(first)


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_of_text(
    frozen: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(base, tmp_path / "base")
    settings = json.loads((mine / "tokenizer_config.json").read_text())
    (mine / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    frozen["model"]["from_base"] = str(mine)
    tokenizer = build_tokenizer(check_recipe(frozen))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": {"model_type": "lfm2"}}, r"model: give either base \(a new decoder\) or from_base"),
        ({"from_base": None, "freeze_base": False}, "give either base"),
        ({"from_base": None, "base": {"model_type": "lfm2"}}, "freeze_base needs from_base"),
        ({"kind": "plain", "lm2": None}, "leaves nothing to train without a memory"),
        ({"lm2": {**LM2, "memory_layers": []}}, "leaves nothing to train without a memory"),
        ({"init_from": "somewhere"}, "from_base and init_from both say"),
        ({"freeze_bas": True}, "unknown key model.freeze_bas; did you mean model.freeze_base"),
    ],
)
def test_model_keys_that_contradict_each_other_are_refused(
    frozen: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    frozen["model"] |= changes
    with pytest.raises(ConfigError, match=said) as caught:
        check_recipe(frozen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("nowhere", CheckpointError, "no model 'nowhere'"),
        ("babilong-tiny-lm2", ConfigError, "has a memory already"),
    ],
)
def test_what_cannot_carry_a_memory_is_refused(frozen: dict[str, Any], source: str, error: Any, said: str) -> None:
    frozen["model"]["from_base"] = source
    with pytest.raises(error, match=said):
        build_model(check_recipe(frozen), 300)


def test_a_tokenizer_larger_than_the_decoders_vocabulary_is_refused(frozen: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has 9000 tokens"):
        build_model(check_recipe(frozen), 9000)


def test_a_shipped_decoder_can_be_the_base(frozen: dict[str, Any]) -> None:
    frozen["model"]["from_base"] = "babilong-tiny-plain"
    recipe = check_recipe(frozen)
    model = build_model(recipe, len(build_tokenizer(recipe)))
    assert isinstance(model, LM2ForCausalLM)
    assert model.base_reference is not None
