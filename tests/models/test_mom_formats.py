"""Published checkpoints become models of ours that compute the same, and go back unchanged to the bit."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published_mom import MOM, RELEASED, SINGLE, Weights, logits, random_weights, save, shapes
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import mnemon
from mnemon.errors import CheckpointError, ConfigError, MnemonError
from mnemon.models import conversion
from mnemon.models.conversion import convert
from mnemon.models.mom_formats import FORMATS, read_config

FORMAT_CASES = {
    "mom": MOM,
    "mom-one-projection": MOM | {"single_kv_proj": True},
    "mom-one-projection-unshared": MOM | {"single_kv_proj": True, "shared_mem": False},
    "mom-unshared": MOM | {"shared_mem": False},
    "mom-top-1": MOM | {"topk": 1},
    "mom-wide-convolution": MOM | {"conv_size": 6},
    "mom-without-convolution": MOM | {"use_short_conv": False},
    "mom-tied": MOM | {"tie_word_embeddings": True},
    "released": RELEASED,
    "released-one-projection": RELEASED | {"single_expert": True},
    "single": SINGLE,
    "single-without-convolution": SINGLE | {"use_short_conv": False},
}
every_format = pytest.mark.parametrize("config", FORMAT_CASES.values(), ids=FORMAT_CASES)


@pytest.fixture(autouse=True)
def _registered() -> None:
    mnemon.register()


@pytest.fixture
def double_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decoder's own norms compute in the model's dtype, which the library does in float32."""
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )


def random_ids(count: int) -> list[int]:
    return torch.randint(0, MOM["vocab_size"], (count,), generator=torch.Generator().manual_seed(3)).tolist()


def converted(tmp_path: Path, config: dict[str, Any], weights: Weights | None = None) -> Path:
    save(tmp_path / "source", config, random_weights(config) if weights is None else weights)
    convert(tmp_path / "source", tmp_path / "ours")
    return tmp_path / "ours"


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@every_format
@torch.no_grad()
def test_a_converted_model_computes_what_the_published_one_does(config, tmp_path, double_norms):
    weights, ids = random_weights(config), random_ids(23)
    model = load(converted(tmp_path, config, weights))
    expected = logits(config, weights, ids)
    got = model(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_rows_of_a_batch_with_padding_and_single_steps_compute_it_too(tmp_path, double_norms):
    weights, ids = random_weights(MOM), random_ids(12)
    model = load(converted(tmp_path, MOM, weights))
    expected = logits(MOM, weights, ids)
    rows, mask = torch.tensor([[0, 0, 0, *ids], random_ids(15)]), torch.ones(2, 15, dtype=torch.int64)
    mask[0, :3] = 0
    torch.testing.assert_close(model(rows, attention_mask=mask).logits[0, 3:], expected, rtol=1e-10, atol=1e-10)
    cache, steps = None, []
    for token in ids:
        output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits[0, 0])
    torch.testing.assert_close(torch.stack(steps), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_epsilon_of_the_norms_matters(tmp_path):
    model = load(converted(tmp_path, MOM))
    layer, x = model.memory_layers[0], torch.randn(1, 9, MOM["hidden_size"], dtype=torch.float64)
    assert (layer.norm_eps, model.config.base_config.rms_norm_eps) == (MOM["norm_eps"], MOM["norm_eps"])
    published = layer(x)[0]
    layer.norm_eps = 1e-5
    assert (layer(x)[0] - published).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="norm_eps must be above 0, got 0"):
        mnemon.MoMConfig(base_config=model.config.base_config, norm_eps=0.0)


BACK = [
    name for name, config in FORMAT_CASES.items() if name not in ("mom-without-convolution", "released-one-projection")
]


@pytest.mark.parametrize("name", BACK)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_there_and_back_is_the_same_to_the_bit(name, dtype, tmp_path):
    config = FORMAT_CASES[name]
    weights = random_weights(config, dtype)
    back = tmp_path / "back"
    convert(converted(tmp_path, config, weights), back, to="fla")
    returned = load_file(back / "model.safetensors")
    if name == "released":  # comes back in the one format that flash-linear-attention reads
        for layer in range(config["num_hidden_layers"]):
            del weights[f"model.layers.{layer}.attn.D"]
            mlp = f"model.layers.{layer}.mlp"
            weights[f"{mlp}.gate_proj.weight"], weights[f"{mlp}.up_proj.weight"] = weights[
                f"{mlp}.gate_proj.weight"
            ].chunk(2)
        config = MOM
    assert returned.keys() == weights.keys()
    assert all(returned[key].dtype == dtype and torch.equal(returned[key], weights[key]) for key in weights)
    written = json.loads((back / "config.json").read_text())
    ignored = {"fuse_norm", "fuse_swiglu", "attnres_block_size", "allow_neg_eigval", "num_v_heads"}
    assert {key: written.get(key) for key in config.keys() - ignored - {"architectures"}} == {
        key: config[key] for key in config.keys() - ignored - {"architectures"}
    }
    assert written["dtype"] == str(dtype).removeprefix("torch.")


def test_every_tensor_of_a_model_with_all_options_has_a_published_name(tmp_path):
    folder = converted(tmp_path, MOM)
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == load(folder).state_dict().keys()
    numbers = sum(torch.Size(shape).numel() for shape in shapes(MOM).values())
    assert sum(tensor.numel() for tensor in stored.values()) == numbers


@torch.no_grad()
def test_large_checkpoints_come_and_go_in_several_files(tmp_path):
    weights, source = random_weights(MOM, torch.float32), tmp_path / "source"
    whole = converted(tmp_path / "whole", MOM, weights)
    save(source, MOM, weights)
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: weights[name] for name in own}, source / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "ours", shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all((tmp_path / "ours" / shard).stat().st_size < 25_000 for shard in shards)
    assert not list((tmp_path / "ours").glob("*.tmp"))
    ids = torch.tensor([random_ids(9)])
    assert torch.equal(load(tmp_path / "ours")(ids).logits, load(whole)(ids).logits)


def test_bfloat16_stays_and_written_files_are_readable_by_others(tmp_path):
    folder = converted(tmp_path, MOM, random_weights(MOM, torch.bfloat16))
    model = load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_the_weights_say_whether_the_head_is_the_embedding(tmp_path):
    declared = MOM | {"tie_word_embeddings": True}
    weights = random_weights(MOM)
    assert not load(converted(tmp_path / "own head", declared, weights)).config.base_config.tie_word_embeddings
    weights["lm_head.weight"] = weights["model.embeddings.weight"].clone()
    model = load(converted(tmp_path / "same head", MOM, weights))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    del weights["lm_head.weight"]
    model = load(converted(tmp_path / "no head", declared, weights))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(CheckpointError, match=r"lacks tensors: lm_head\.weight$"):
        converted(tmp_path / "missing head", MOM, weights)


def test_the_width_of_the_feed_forward_may_stand_in_the_weights_alone(tmp_path):
    for number, config in enumerate((MOM, RELEASED)):
        weights = random_weights(config)
        model = load(converted(tmp_path / str(number), config | {"intermediate_size": None}, weights))
        assert model.config.base_config.intermediate_size == config["intermediate_size"]
    for layer in range(MOM["num_hidden_layers"]):
        del weights[f"model.layers.{layer}.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match="intermediate_size is not in the configuration"):
        converted(tmp_path / "nowhere", RELEASED | {"intermediate_size": None}, weights)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("mom", {"num_memories": 4, "shared_memory": True, "num_heads": 4, "value_dim": 256, "num_hidden_layers": 24}),
        (
            "mom_gated_deltanet",
            {"num_memories": 8, "shared_memory": False, "num_heads": 6, "value_dim": 512, "num_hidden_layers": 21},
        ),
        ("gated_deltanet", {"layer_types": ["memory"] * 21, "num_heads": 6, "value_dim": 512, "hidden_size": 2048}),
    ],
)
def test_keys_left_out_have_the_formats_own_values(model_type, expected):
    config, notes = read_config(FORMATS[model_type], {"model_type": model_type, "intermediate_size": 64}, {}, False)
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.top_k, config.norm_eps, config.head_dim, notes) == (2, 1e-6, 256, [])


def test_the_balance_loss_is_the_one_of_the_published_training(tmp_path):
    assert load(converted(tmp_path / "mom", MOM)).config.balance_loss == "global"
    config = load(converted(tmp_path / "released", RELEASED)).config
    assert (config.balance_loss, config.balance_weight) == ("layer", RELEASED["aux_loss_scale"])
    notes = convert(tmp_path / "released" / "ours", tmp_path / "fla", to="fla").notes
    assert any("averages over all layers" in note for note in notes)


def test_what_has_no_effect_is_left_out_with_a_remark(tmp_path):
    save(tmp_path / "a", MOM | {"capacity": 1.25, "moon_phase": 3}, random_weights(MOM))
    notes = "\n".join(convert(tmp_path / "a", tmp_path / "b").notes)
    assert "capacity 1.25 was left out" in notes
    assert "not known and left out: moon_phase" in notes
    assert "no tokenizer to copy" in notes
    save(tmp_path / "c", RELEASED, random_weights(RELEASED))
    assert any("attn.D" in note for note in convert(tmp_path / "c", tmp_path / "d").notes)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MOM, {"model_type": "gla"}, "a model of type 'gla'; expected one of mom,"),
        (MOM, {"mom_backend": "gla"}, "mom_backend is 'gla' .another update rule.; only 'gated_deltanet'"),
        (MOM, {"attn": {"layers": [1], "num_heads": 2}}, "attn is set"),
        (MOM, {"attnres_block_size": 2}, "attnres_block_size is 2"),
        (MOM, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (MOM, {"use_output_gate": False}, "use_output_gate .or use_gate. is false"),
        (MOM, {"expand_v": 1.3}, "expand_v = 1.3 times head_dim = 6"),
        (MOM, {"topk": 4}, "top_k=4 exceeds num_memories=3"),
        (MOM, {"num_heads": "2"}, "num_heads must be a whole number of at least 1, got '2'"),
        (MOM, {"eos_token_id": "end"}, "cannot be used: .*'eos_token_id'"),
        (MOM, {"norm_eps": 0}, "norm_eps must be a number above 0, got 0"),
        (MOM, {"num_experts": 2}, "num_experts is 2 and num_memories is 3"),
        (RELEASED, {"capacity": 0.5}, "capacity is 0.5: .* is not causal"),
        (RELEASED, {"norm_first": True}, "norm_first is True"),
        (RELEASED, {"use_gate": False}, "use_output_gate .or use_gate. is false"),
        (SINGLE, {"allow_neg_eigval": True}, "allow_neg_eigval is True .write strengths up to 2."),
        (SINGLE, {"num_v_heads": 4}, "num_v_heads is 4"),
        (SINGLE, {"output_gate_activation": "sigmoid"}, "output_gate_activation is 'sigmoid'"),
    ],
)
def test_what_a_model_of_ours_cannot_be_is_refused_in_one_line(config, changes, message, tmp_path):
    save(tmp_path / "source", config | changes, random_weights(config))
    with pytest.raises(MnemonError, match=message) as caught:
        convert(tmp_path / "source", tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


ATTENTION = "model.layers.1.attn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{ATTENTION}.a_proj.2.weight"), rf"lacks tensors: {ATTENTION}\.a_proj\.2\.weight$"),
        (lambda w: w.update({f"{ATTENTION}.D": torch.ones(2)}), rf"has unknown tensors: {ATTENTION}\.D$"),
        (
            lambda w: w.update({f"{ATTENTION}.k_conv1d.weight": torch.ones(12, 1, 3)}),
            rf"mis-shaped tensors: {ATTENTION}\.k_conv1d\.weight \[12, 1, 3\], expected \[12, 1, 4\]$",
        ),
        (
            lambda w: w.update({f"{ATTENTION}.v_proj.1.weight": w[f"{ATTENTION}.v_proj.1.weight"].float()}),
            rf"{ATTENTION}\.v_proj\.1\.weight is torch\.float32, .*expected one dtype",
        ),
        (lambda w: w.update({f"{ATTENTION}.A_log": torch.ones(2, dtype=torch.int8)}), r"A_log is of type I8"),
    ],
    ids=["missing", "extra", "mis-shaped", "mixed dtypes", "integers"],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    weights = random_weights(MOM)
    change(weights)
    with pytest.raises(CheckpointError, match=message) as caught:
        converted(tmp_path, MOM, weights)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


class Bomb:
    """Whoever unpickles this raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1/0",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_and_never_read(name, tmp_path):
    folder = save(tmp_path / "source", MOM, {})
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=f"has {name} and no safetensors; such files can run code"):
        convert(folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "must hold a JSON object, got a list"),
        ("model.safetensors", None, "has neither model.safetensors nor"),
        ("model.safetensors", "nothing", "is damaged or truncated"),
        ("model.safetensors.index.json", "{}", "index.json cannot be read"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../a.safetensors"}}', "no usable weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "lacks b.safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors"}}', "names a in model.safetensors"),
    ],
)
def test_damaged_folders_are_one_line(file, content, message, tmp_path):
    folder = save(tmp_path / "source", MOM, random_weights(MOM))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        convert(folder, tmp_path / "ours")
    assert "\n" not in str(caught.value)


def our_model(folder: Path, *, base: dict[str, Any] | None = None, **options: Any) -> Path:
    """Save a random MoM of ours whose norms all have the same epsilon."""
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    base_config = LlamaConfig(**sizes | (base or {}))
    sizes = {"num_heads": 2, "head_dim": 6, "value_dim": 9, "num_memories": 3, "initial_output": 1.0}
    model = mnemon.MoMForCausalLM(mnemon.MoMConfig(base_config=base_config, **sizes | options))
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_model_of_ours_goes_to_the_published_format_and_returns(tmp_path):
    ours = our_model(tmp_path / "ours")
    done = convert(ours, tmp_path / "fla", to="fla")
    assert (done.source_format, done.target_format) == ("mnemon", "mom")
    config = json.loads((tmp_path / "fla" / "config.json").read_text())
    stored = load_file(tmp_path / "fla" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == shapes(config)
    weights = {name: tensor.double() for name, tensor in stored.items()}
    ids = random_ids(17)
    expected = logits(config, weights, ids)
    torch.testing.assert_close(load(ours)(torch.tensor([ids])).logits[0].double(), expected, rtol=1e-4, atol=1e-4)
    convert(tmp_path / "fla", tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(torch.tensor([ids])).logits, load(ours)(torch.tensor([ids])).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "delta_net"}, "the update rule is delta_net"),
        ({"layer_types": ["mom", "full_attention"]}, "the layers differ .full_attention, mom."),
        ({"capacity": 0.5}, "memories take a share of 0.5"),
        ({"conv_size": 0}, "it has no convolution"),
        ({"norm_eps": 1e-6}, "the norms' epsilon is 1e-06 in the memories and 1e-05 elsewhere"),
        ({"base": {"mlp_bias": True}}, "the feed-forward has biases"),
        ({"base": {"hidden_act": "gelu"}}, "the activation is gelu"),
    ],
)
def test_what_the_published_format_cannot_be_is_refused_with_the_reason(options, message, tmp_path):
    with pytest.raises(ConfigError, match=f"flash-linear-attention has no such model: {message}"):
        convert(our_model(tmp_path / "ours", **options), tmp_path / "fla", to="fla")
    assert not (tmp_path / "fla").exists()


def test_a_decoder_other_than_llama_is_refused(tmp_path):
    base = {
        "model_type": "qwen2",
        "vocab_size": 40,
        "hidden_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = mnemon.MoMConfig(base_config=base | {"num_key_value_heads": 2}, num_heads=2, head_dim=6)
    mnemon.MoMForCausalLM(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match="the decoder is a qwen2, not a llama"):
        convert(tmp_path / "ours", tmp_path / "fla", to="fla")


def test_the_wrong_direction_is_refused(tmp_path):
    ours, theirs = our_model(tmp_path / "ours"), save(tmp_path / "theirs", MOM, random_weights(MOM))
    with pytest.raises(ConfigError, match="is a model of mnemon already; add --to fla"):
        convert(ours, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds a 'mom', not a MoM of mnemon"):
        convert(theirs, tmp_path / "out", to="fla")
    with pytest.raises(ConfigError, match="cannot be converted into itself"):
        convert(theirs, theirs, overwrite=True)


@pytest.mark.parametrize("fields", [{"num_slotz": 3}, {"num_heads": "two"}])
def test_a_damaged_configuration_of_ours_is_one_line(fields, tmp_path):
    folder = our_model(tmp_path / "ours")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(MnemonError) as caught:
        convert(folder, tmp_path / "fla", to="fla")
    assert "\n" not in str(caught.value)


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    folder = save(tmp_path / "source", MOM, random_weights(MOM))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_copy_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
