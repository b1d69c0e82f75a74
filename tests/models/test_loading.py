"""Loading by name: what is damaged, incomplete or unknown is refused in one line that names it."""

import json
from pathlib import Path

import pytest
import torch
from lm2_cases import lfm2_config, llama_config, lm2, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mnemon.data.tokenizer import train_tokenizer
from mnemon.errors import CheckpointError, MnemonError
from mnemon.models.loading import load_model, shipped_checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved LM2 with a tokenizer."""
    lm2(lfm2_config()).float().save_pretrained(tmp_path)
    train_tokenizer(["Mary went to the garden."] * 3, 300).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_saved_model_comes_back_exactly_and_ready_to_generate(folder):
    model, tokenizer = load_model(str(folder))
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not model.training
    assert tokenizer.padding_side == "left"
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 20)).logits, expected(tokens(1, 20)).logits)


def test_a_plain_model_with_tied_weights_loads(tmp_path):
    AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    train_tokenizer(["a"], 300).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("memory.1.slot_key"), r"lacks tensors: memory\.1\.slot_key$"),
        (lambda w: w.update(stray=torch.zeros(2)), "has unknown tensors: stray$"),
        (lambda w: w.update({"memory.1.slot_key": torch.zeros(4, 12)}), r"slot_key \[4, 12\], expected \[5, 12\]"),
    ],
    ids=["missing", "extra", "mis-shaped"],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_model(str(folder))


def test_weights_that_are_not_there_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "text", ["{", json.dumps({"model_type": "lm2", "num_slotz": 3}), json.dumps({"model_type": "nothing-known"})]
)
def test_a_configuration_that_cannot_be_used_is_one_line(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(MnemonError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt17", "./nowhere", "a/b/c", ""])
def test_a_name_that_means_nothing_is_refused(name):
    with pytest.raises(CheckpointError, match="expected a folder, a hub name"):
        load_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        load_model(str(tmp_path))


def test_a_hub_name_without_a_network_is_one_line():
    with pytest.raises(CheckpointError, match="cannot load owner/model") as caught:
        load_model("owner/model")
    assert "\n" not in str(caught.value)


def test_the_shipped_models_are_small_and_of_equal_size():
    sizes = {}
    for name, path in shipped_checkpoints().items():
        assert sum(file.stat().st_size for file in path.iterdir()) <= 10e6
        model, _ = load_model(name)
        sizes[name] = model.num_parameters()
        for needed in ("README.md", "recipe.yaml", "summary.json", "training_log.jsonl"):
            assert (path / needed).is_file()
    assert {"babilong-tiny-lm2", "babilong-tiny-plain", "babilong-tiny-window"} <= sizes.keys()
    assert max(sizes.values()) <= 1.02 * min(sizes.values())
