"""A memory saved alone comes back exactly on its base, and on no other."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm2_cases import lfm2_config, llama_config, lm2, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mnemon.data.tokenizer import train_tokenizer
from mnemon.errors import CheckpointError, ConfigError
from mnemon.models.base_model import fingerprint, own_tensors
from mnemon.models.loading import load_model
from mnemon.models.modeling_lm2 import LM2ForCausalLM

OPTIONS: dict[str, Any] = {"num_slots": 5, "slot_dim": 12, "num_memory_heads": 3, "segment_length": 7}
INPUT = tokens(2, 20)


def decoder(config: Any = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config or llama_config(), dtype=dtype)
    return model.eval()


def train(model: LM2ForCausalLM, steps: int = 2) -> LM2ForCausalLM:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model.train()(INPUT, labels=INPUT).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def trained(base: PreTrainedModel, **options: Any) -> LM2ForCausalLM:
    torch.manual_seed(1)
    return train(LM2ForCausalLM.from_base(base, freeze_base=True, **(OPTIONS | options)))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=INPUT).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, its tokenizer, and the adapter of a trained memory, side by side; do not change it."""
    root = tmp_path_factory.mktemp("saved")
    decoder().save_pretrained(root / "base")
    train_tokenizer(["Mary went to the garden."] * 3, 300).save_pretrained(root / "base")
    trained(AutoModelForCausalLM.from_pretrained(root / "base")).save_adapter(root / "adapter")
    return root


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """The same folder, to change."""
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Any) -> None:
    """Change the weights and the checksum with them."""
    path = folder / "memory.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    change_config(folder, weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def refused(error: type[Exception], said: str, action: Any) -> None:
    with pytest.raises(error, match=said) as caught:
        action()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "tied", "lfm2", "bfloat16"])
@pytest.mark.parametrize("flow", ["depth", "layer"])
def test_a_memory_saved_alone_comes_back_exactly(tmp_path: Path, name: str, flow: str) -> None:
    config = lfm2_config() if name == "lfm2" else llama_config(tie_word_embeddings=name == "tied")
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    decoder(config, dtype=dtype).save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), flow=flow, attention_span=9)
    before = torch.get_rng_state()
    loaded = LM2ForCausalLM.from_adapter(model.save_adapter(tmp_path / "adapter"))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.dtype == dtype
    assert loaded.initial_state(1).bank.dtype == torch.float32
    assert not loaded.training
    fresh = LM2ForCausalLM.from_base(str(tmp_path / "base"), **OPTIONS)
    assert not torch.equal(logits(fresh), logits(model)), (
        "the trained memory must do something for this to say anything"
    )


def test_the_folder_is_small_and_holds_no_weight_of_the_base(saved: Path) -> None:
    names = set(load_file(saved / "adapter" / "memory.safetensors"))
    assert names == set(LM2ForCausalLM.from_adapter(saved / "adapter").memory.state_dict())
    assert {path.name for path in (saved / "adapter").iterdir()} == {"adapter_config.json", "memory.safetensors"}


def test_training_with_a_frozen_base_changes_the_memory_alone(saved: Path) -> None:
    base = decoder()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = LM2ForCausalLM.from_base(base, freeze_base=True, **OPTIONS)
    memory = {name: tensor.clone() for name, tensor in model.memory.state_dict().items()}
    train(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    unchanged = [name for name, tensor in model.memory.named_parameters() if torch.equal(memory[name], tensor)]
    assert not unchanged


def test_a_frozen_base_runs_without_dropout_and_a_trainable_one_with_it() -> None:
    frozen = LM2ForCausalLM.from_base(decoder(), freeze_base=True, **OPTIONS).train()
    assert frozen.training
    assert not any(module.training for module in frozen.base.modules())
    free = LM2ForCausalLM.from_base(decoder(llama_config(attention_dropout=0.5)), **OPTIONS).train()
    assert free.base.training
    dropped = LM2ForCausalLM.from_base(decoder(llama_config(attention_dropout=0.5)), freeze_base=True, **OPTIONS)
    assert torch.equal(logits(dropped.train()), logits(dropped))
    assert not torch.equal(logits(free), logits(free))


def test_an_adapter_can_be_trained_further_and_saved_again(saved: Path, tmp_path: Path) -> None:
    model = LM2ForCausalLM.from_adapter(saved / "adapter")
    before = logits(model)
    again = LM2ForCausalLM.from_adapter(train(model).save_adapter(tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), before)


def test_the_base_is_found_beside_the_adapter_wherever_both_are_moved(copied: Path) -> None:
    assert json.loads((copied / "adapter" / "adapter_config.json").read_text())["base"]["name_or_path"] == "../base"
    moved = copied.rename(copied.with_name("elsewhere"))
    model, tokenizer = load_model(str(moved / "adapter"))
    assert torch.equal(logits(model), logits(LM2ForCausalLM.from_adapter(moved / "adapter", str(moved / "base"))))
    assert tokenizer.padding_side == "left"


def test_a_base_given_by_a_relative_path_is_found_from_another_working_directory(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied)
    model = LM2ForCausalLM.from_base(Path("base"), freeze_base=True, **OPTIONS)
    monkeypatch.chdir(tmp_path)
    model.save_adapter("here")
    monkeypatch.chdir(tmp_path / "here")
    assert torch.equal(logits(LM2ForCausalLM.from_adapter(".")), logits(model))


def test_a_shipped_base_is_named_not_located(tmp_path: Path) -> None:
    model = LM2ForCausalLM.from_base("babilong-tiny-plain", freeze_base=True, **OPTIONS)
    model.save_adapter(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base"]["name_or_path"] == "babilong-tiny-plain"
    assert LM2ForCausalLM.from_adapter(tmp_path).config.num_slots == 5


def test_an_adapter_is_a_model_by_name_with_its_own_tokenizer_or_its_bases(copied: Path) -> None:
    model, tokenizer = load_model(str(copied / "adapter"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert tokenizer.name_or_path == str(copied / "base")
    train_tokenizer(["a b c d e f g h"] * 3, 301).save_pretrained(copied / "adapter")
    assert load_model(str(copied / "adapter"))[1].name_or_path == str(copied / "adapter")


def test_another_base_is_refused_with_both_fingerprints(saved: Path) -> None:
    other = decoder(seed=1)
    expected = fingerprint(decoder())[:16]
    for base in (other, decoder().bfloat16()):
        said = f"another base: expected fingerprint {expected}, got {fingerprint(base)[:16]}"
        refused(CheckpointError, said, lambda base=base: LM2ForCausalLM.from_adapter(saved / "adapter", base))
    said = "dtype bfloat16 instead of float32"
    refused(CheckpointError, said, lambda: LM2ForCausalLM.from_adapter(saved / "adapter", decoder().bfloat16()))


def test_a_base_whose_files_were_replaced_is_refused(copied: Path) -> None:
    decoder(seed=1).save_pretrained(copied / "base")
    refused(CheckpointError, "another base: expected fingerprint", lambda: load_model(str(copied / "adapter")))


def test_a_base_that_changed_is_not_saved_as_an_adapter(tmp_path: Path) -> None:
    free = train(LM2ForCausalLM.from_base(decoder(), **OPTIONS))
    refused(ConfigError, r"is not known.*freeze_base=True", lambda: free.save_adapter(tmp_path))
    touched = trained(decoder())
    with torch.no_grad():
        touched.base.get_input_embeddings().weight[3, 3] += 1e-3
    refused(ConfigError, "the base has changed since", lambda: touched.save_adapter(tmp_path))
    refused(ConfigError, "has no memory", lambda: lm2(llama_config(), memory_layers=[]).save_adapter(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_not_written_to(saved: Path, tmp_path: Path) -> None:
    model = LM2ForCausalLM.from_adapter(saved / "adapter")
    refused(ConfigError, "holds a whole model", lambda: model.save_adapter(saved / "base"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused(ConfigError, "an adapter of another kind", lambda: model.save_adapter(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: change_config(f, format_version=2), "format version 2, this mnemon reads up to 1; update mnemon"),
        (lambda f: change_config(f, format="other"), "does not describe a memory"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "it is PEFT's"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: change_config(f, stray=1), "stray: extra inputs are not permitted"),
        (lambda f: (f / "memory.safetensors").write_bytes(b"x" * 50), "truncated or altered"),
        (lambda f: (f / "memory.safetensors").unlink(), "the adapter is incomplete"),
        (lambda f: change_weights(f, lambda t: t.pop("1.slot_key")), r"lacks tensors: 1\.slot_key$"),
        (lambda f: change_weights(f, lambda t: t.update(stray=torch.ones(1))), "has unknown tensors: stray$"),
    ],
    ids=["newer", "kind", "peft", "not-json", "extra-key", "truncated", "no-weights", "missing", "extra"],
)
def test_a_damaged_or_foreign_adapter_is_refused_in_one_line(copied: Path, change: Any, said: str) -> None:
    change(copied / "adapter")
    refused(CheckpointError, said, lambda: load_model(str(copied / "adapter")))


@pytest.mark.parametrize(
    ("option", "value", "error", "said"),
    [
        ("num_slotz", 3, ConfigError, "adapter_config.json: LM2Config has no key 'num_slotz'; did you mean num_slots"),
        ("memory_layers", [7], ConfigError, "memory_layers names block 7"),
        ("num_slots", 6, CheckpointError, r"mis-shaped tensors: 0\.slot_key \[5, 12\], expected \[6, 12\]"),
        ("memory_layers", [0], CheckpointError, r"has unknown tensors: 1\."),
    ],
)
def test_options_that_do_not_fit_are_refused(copied: Path, option: str, value: Any, error: Any, said: str) -> None:
    path = copied / "adapter" / "adapter_config.json"
    options = json.loads(path.read_text())["lm2"]
    change_config(copied / "adapter", lm2=options | {option: value})
    refused(error, said, lambda: load_model(str(copied / "adapter")))


def test_a_base_that_is_nowhere_is_asked_for(copied: Path) -> None:
    (copied / "base").rename(copied / "gone")
    refused(CheckpointError, "its base is not at", lambda: load_model(str(copied / "adapter")))
    base = json.loads((copied / "adapter" / "adapter_config.json").read_text())["base"]
    change_config(copied / "adapter", base=base | {"name_or_path": None})
    refused(CheckpointError, "does not say where its base is", lambda: load_model(str(copied / "adapter")))
    assert LM2ForCausalLM.from_adapter(copied / "adapter", str(copied / "gone")).banks


def test_what_is_no_plain_decoder_is_refused_as_a_base(saved: Path, tmp_path: Path) -> None:
    refused(ConfigError, "has a memory already", lambda: LM2ForCausalLM.from_base(lm2(llama_config())))
    refused(CheckpointError, "is an adapter; expected", lambda: LM2ForCausalLM.from_base(str(saved / "adapter")))
    said = "without config.json or adapter_config.json"
    refused(CheckpointError, said, lambda: LM2ForCausalLM.from_base(str(tmp_path)))
    refused(CheckpointError, "holds no adapter_config.json", lambda: LM2ForCausalLM.from_adapter(tmp_path))


def test_a_base_with_missing_or_damaged_weights_is_refused(copied: Path) -> None:
    path = copied / "base" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    said = r"lacks weights of the decoder: model\.layers\.1\.self_attn\.q_proj\.weight$"
    refused(CheckpointError, said, lambda: LM2ForCausalLM.from_base(copied / "base", **OPTIONS))
    path.write_bytes(path.read_bytes()[:-100])
    refused(CheckpointError, "cannot load the base", lambda: LM2ForCausalLM.from_base(copied / "base", **OPTIONS))


class Tensors(nn.Module):
    """Two parameters, a tied one, a saved and an unsaved buffer; not all contiguous or of one dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.arange(6.0).reshape(2, 3).to(dtype))
        self.a = nn.Parameter(torch.arange(6.0).reshape(3, 2).T)
        self.tied = self.b
        self.register_buffer("saved", torch.tensor(3))
        self.register_buffer("unsaved", torch.tensor(4), persistent=False)


def test_a_fingerprint_is_the_sha256_of_names_dtypes_shapes_and_bytes() -> None:
    digest = hashlib.sha256()
    for head, data in (
        (b'["a", "float32", [2, 3]]\n', torch.tensor([[0.0, 2, 4], [1, 3, 5]])),
        (b'["b", "float32", [2, 3]]\n', torch.arange(6.0)),
        (b'["saved", "int64", []]\n', torch.tensor(3)),
    ):
        digest.update(head + data.numpy().tobytes())
    assert fingerprint(Tensors()) == digest.hexdigest()


def test_a_fingerprint_sees_every_change_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = fingerprint(Tensors())
    renamed, moved = Tensors(), Tensors()
    renamed.c = renamed.a
    del renamed.a
    with torch.no_grad():
        moved.b[1, 2] = torch.nextafter(moved.b[1, 2], torch.tensor(9.0))
    negative = Tensors()
    with torch.no_grad():
        negative.b[0, 0] = -0.0  # equal to 0.0, other bytes
    others = [renamed, moved, negative, Tensors(torch.bfloat16)]
    assert len({reference, *map(fingerprint, others)}) == 5
    unsaved = Tensors()
    unsaved.unsaved += 1
    assert fingerprint(unsaved) == reference
    monkeypatch.setattr("mnemon.models.base_model._CHUNK_BYTES", 8)
    assert fingerprint(Tensors()) == reference


def test_a_fingerprint_survives_saving_and_counts_tied_weights_once(tmp_path: Path) -> None:
    base = decoder(llama_config(tie_word_embeddings=True))
    base.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint(base)
    assert len(own_tensors(base)) == len(list(base.parameters()))


@pytest.mark.gpu
def test_a_fingerprint_is_the_same_on_a_gpu() -> None:
    base = decoder()
    assert fingerprint(base) == fingerprint(base.to("cuda"))
