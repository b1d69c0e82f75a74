"""MoM beyond the contracts: sizes of the paper, saving, training, routing, options, long inputs, named mistakes."""

import copy
import json
import math

import pytest
import torch
from lm2_cases import llama_config, tokens
from mom_cases import MIXED, lm2_on_mom, mom, mom_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig

from mnemon.errors import CheckpointError, ConfigError, ShapeError, StateError
from mnemon.layers.mixture_of_memories import MixtureOfMemories
from mnemon.layers.routing import balance_loss, load
from mnemon.models import modeling_mom
from mnemon.models.configuration_mom import MoMConfig
from mnemon.models.memory_model import MemoryModel
from mnemon.models.modeling_mom import MoMForCausalLM
from mnemon.models.state import MemoryCache, MemoryState
from mnemon.models.weight_files import check_model_folder

LONG = 25
HYBRID = {"layer_types": ["mom", "full_attention", "memory"]}


def logits_of(model: MemoryModel, ids: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def ragged(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return mask


# Sizes


@pytest.mark.parametrize(
    ("hidden", "feed_forward", "tied", "total", "active"),
    [
        (1024, 2048, True, 512.35, 411.30), (1024, 2048, False, 545.12, 444.06),
        (2048, 5632, True, 1552.9, 1350.8), (2048, 5632, False, 1618.4, 1416.3),
    ],
    ids=["340M tied", "340M", "1.3B tied", "1.3B"],
)  # fmt: skip
def test_the_papers_models_have_the_papers_sizes(hidden, feed_forward, tied, total, active):
    base = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=24,
        num_attention_heads=4, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = MoMForCausalLM(MoMConfig(base_config=base, num_heads=4, head_dim=256))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(total, rel=1e-4)
    assert model.num_active_parameters() / 1e6 == pytest.approx(active, rel=1e-4)


def test_a_fresh_memory_adds_nothing_and_learns_from_the_first_step_on():
    ids = tokens(2, 9)
    models = {scale: mom(initial_output=scale) for scale in (0.0, 0.5, 1.0)}
    outputs = {
        scale: [parameter for name, parameter in model.named_parameters() if "o_proj" in name and "layer." in name]
        for scale, model in models.items()
    }
    assert len(outputs[0.0]) == 3
    for silent, half, full in zip(*outputs.values(), strict=True):
        assert not silent.any()
        torch.testing.assert_close(half, 0.5 * full)
    models[0.0](ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for parameter in outputs[0.0])


def test_by_default_a_fresh_memory_adds_about_as_much_as_an_embedding_has():
    base = llama_config(hidden_size=64, initializer_range=0.05)
    found = MoMForCausalLM(MoMConfig(base_config=base, num_heads=2, head_dim=32)).base.model.layers
    for layer in found:
        assert layer.self_attn.layer.o_proj.weight.std().item() * 8 == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"single_kv_proj": True}, {"layer_types": ["memory"] * 3}, MIXED, {"rule": "mamba2"}],
    ids=str,
)  # fmt: skip
def test_active_parameters_are_all_but_those_of_the_memories_not_chosen(options):
    model = mom(**options)
    total = sum(parameter.numel() for parameter in model.parameters())
    mixtures = [layer for layer in model.memory_layers if isinstance(layer, MixtureOfMemories)]
    idle = sum(
        parameter[0].numel() * (3 - layer.router.top_k)
        for layer in mixtures
        for parameter in layer.parameters()
        if not layer.single_kv_proj and parameter.ndim > 1 and len(parameter) == 4  # three memories and the shared one
    )
    assert total - model.num_active_parameters() == idle
    assert (idle > 0) == (bool(mixtures) and options.get("top_k") != 3 and "single_kv_proj" not in options)


# Initial weights, saving and loading


def memory_weights(model: MemoryModel) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".layer." in name}


@pytest.mark.parametrize("rule", ["gated_delta_net", "mamba2", "gla"])
def test_memories_start_as_their_layer_says_and_the_rest_as_the_decoder_says(rule):
    torch.manual_seed(0)
    base = llama_config(hidden_size=64, initializer_range=0.02)
    model = MoMForCausalLM(mom_config(base, rule=rule, num_heads=4, head_dim=16))
    projections = {name: p for name, p in memory_weights(model).items() if "proj." in name or "router" in name}
    assert projections
    for name, parameter in projections.items():
        assert parameter.std().item() == pytest.approx(1 / math.sqrt(parameter.shape[-1]), rel=0.15), name
    for name, parameter in model.named_parameters():
        if "mlp" in name or "embed" in name or "head" in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        assert parameter.isfinite().all(), name


def test_the_same_seed_builds_the_same_model():
    one, other, third = mom(seed=3), mom(seed=3), mom(seed=4)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
    assert not torch.equal(logits_of(one, tokens(1, 5)), logits_of(third, tokens(1, 5)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("build", [mom, lm2_on_mom], ids=["mom", "lm2 on mom"])
def test_saving_and_loading_is_exact_with_tied_and_untied_embeddings(build, tied, tmp_path):
    base = llama_config(tie_word_embeddings=tied)
    model = mom(base, **MIXED) if build is mom else lm2_on_mom(base_config=base)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    check_model_folder(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    ids = tokens(2, LONG)
    assert torch.equal(logits_of(again.eval(), ids), logits_of(model, ids))


def test_a_folder_that_lacks_a_weight_is_refused_and_a_new_one_would_be_the_layers_own(tmp_path):
    model = mom()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "base.model.layers.1.self_attn.layer.k_proj.weight"
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks tensors: {name}$"):
        check_model_folder(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # the library goes on
    for key, value in kept.items():
        assert torch.equal(again.get_parameter(key), value), key
    assert again.get_parameter(name).std().item() == pytest.approx(1 / math.sqrt(32), rel=0.15)


def test_a_model_loads_in_another_precision(tmp_path):
    model = mom()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    state = again(tokens(1, 5), use_cache=True).past_key_values.state
    dtypes = {tensor.dtype for tensor in state.tensors()}
    assert dtypes == {torch.bfloat16, torch.float32, torch.int64}  # tails, memories, counts


def test_the_number_of_memories_per_token_is_never_taken_for_a_setting_of_generation(tmp_path):
    model = mom(num_memories=4, top_k=3)
    saved = model.config.to_dict()
    assert "top_k" not in saved
    assert GenerationConfig.from_model_config(model.config).top_k in (None, GenerationConfig().top_k)
    assert model.generation_config.top_k in (None, GenerationConfig().top_k)
    model.save_pretrained(tmp_path)
    for file in ("config.json", "generation_config.json"):
        assert "top_k" not in json.loads((tmp_path / file).read_text(encoding="utf-8"))
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.num_memories, again.top_k) == (4, 3)
    assert AutoConfig.for_model(**saved).top_k == 3
    assert copy.deepcopy(model.config).top_k == MoMConfig.from_dict(saved).top_k == 3
    nested = lm2_on_mom(num_memories=4, top_k=3).config
    assert AutoConfig.for_model(**nested.to_dict()).base_config.top_k == 3


def test_sampling_draws_from_as_many_tokens_as_the_call_says():
    ids = tokens(1, 5)
    torch.manual_seed(0)
    few = mom(num_memories=3, top_k=1, seed=1)
    options = {"do_sample": True, "max_new_tokens": 1, "pad_token_id": 0, "num_return_sequences": 200}
    drawn = few.generate(ids, temperature=50.0, **options)[:, -1].unique()
    assert len(drawn) > 20  # a top_k of 1 would always draw the same
    assert len(few.generate(ids, top_k=2, temperature=50.0, **options)[:, -1].unique()) == 2


# Training


@pytest.mark.parametrize("build", [mom, lm2_on_mom], ids=["mom", "lm2 on mom"])
@pytest.mark.parametrize("options", [{}, HYBRID, MIXED], ids=["mom", "full hybrid", "sliding hybrid"])
def test_recomputing_activations_gives_exactly_the_gradients_of_keeping_them(build, options):
    ids = tokens(2, LONG)
    labels = ids.masked_fill(ragged(ids) == 0, -100)
    gradients = []
    for checkpointed in (False, True):
        model = build(**({"sliding_window": None, "layer_types": None} | options)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.is_gradient_checkpointing == checkpointed
        loss = model(ids, attention_mask=ragged(ids), labels=labels).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-9, atol=1e-12), name


def test_recomputing_runs_every_block_twice_and_only_in_training():
    model, ids, runs = mom(**HYBRID), tokens(1, 9), []
    model.blocks[0].module.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable()
    logits_of(model, ids)
    assert len(runs) == 1
    model.train()(ids, labels=ids).loss.backward()
    assert len(runs) == 3
    model.gradient_checkpointing_disable()
    model(ids, labels=ids).loss.backward()
    assert len(runs) == 4
    with pytest.raises(ConfigError, match="use_reentrant=True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("build", [mom, lm2_on_mom], ids=["mom", "lm2 on mom"])
def test_every_parameter_gets_a_gradient(build):
    model, ids = build(**MIXED).train(), tokens(2, LONG)
    model(ids, labels=ids).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # In an LM2 model the gates of a bank are at their neutral start, where nothing but them has a slope there.
    assert [name for name in without if not name.startswith("memory.")] == []


def test_gradients_flow_through_the_memories_from_call_to_call():
    model, ids = mom(**MIXED).train(), tokens(1, 18)
    slopes = []
    for cuts in ([18], [7, 11]):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        cache = None
        for piece in embedded.split(cuts, dim=1):
            output = model(inputs_embeds=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
        output.logits[:, -1].square().sum().backward()
        slopes.append(embedded.grad)
    assert torch.allclose(*slopes, rtol=1e-6, atol=1e-9)
    assert (slopes[0][0].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize("kind", ["global", "layer"])
@pytest.mark.parametrize("build", [mom, lm2_on_mom], ids=["mom", "lm2 on mom"])
def test_the_balance_loss_is_added_in_training_alone_times_its_weight(build, kind):
    ids = tokens(2, LONG)
    losses = {}
    for weight in (0, 0.01, 3.0):
        model = build(**(MIXED | {"balance_weight": weight, "balance_loss": kind}))
        losses["eval", weight] = model(ids, labels=ids).loss
        losses["train", weight] = model.train()(ids, labels=ids).loss
        assert losses["eval", weight] == losses["eval", 0] == losses["train", 0]
    part = losses["train", 3.0] - losses["train", 0]
    assert part.item() == pytest.approx(300 * (losses["train", 0.01] - losses["train", 0]).item(), rel=1e-4)
    found = model(ids, output_routing=True)
    assert part.item() == pytest.approx(3 * found.balance_loss.item(), rel=1e-5)
    assert found.loads.shape == (1, 3)
    assert 2 * 3 * 0.99 < part.item() < 3 * 3  # between balance (top_k) and collapse (num_memories)


def test_the_balance_loss_is_that_of_the_routers_over_the_tokens_that_count():
    model, ids = mom(**(MIXED | {"layer_types": ["mom", "sliding_attention", "mom"]})), tokens(2, LONG)
    mask, found = ragged(ids), []
    for layer in model.memory_layers:
        layer.register_forward_hook(lambda _, __, output: found.append(output[2].statistics()))
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=ids, output_routing=True)
        assert [statistics.tokens.tolist() for statistics in found] == [[LONG, LONG - 5]] * 2
        assert torch.equal(output.balance_loss, balance_loss(found, "global"))
        assert torch.equal(output.loads, torch.stack([load(statistics) for statistics in found]))
        other = ids.masked_fill(mask == 0, 4)  # what stands where nothing counts
        again = model(other, attention_mask=mask, output_routing=True)
    assert torch.equal(output.balance_loss, again.balance_loss)
    assert torch.allclose(output.loads.sum(dim=-1), torch.ones(2, dtype=torch.float64))


def test_the_balance_loss_of_a_text_does_not_depend_on_how_it_is_read(monkeypatch):
    model, ids = mom(), tokens(2, LONG)
    with torch.no_grad():
        whole = model(ids, output_routing=True)
        monkeypatch.setattr(modeling_mom, "_CALL_LENGTH", 4)
        pieces = model(ids, output_routing=True)
    assert torch.allclose(whole.balance_loss, pieces.balance_loss, rtol=1e-9)
    assert torch.allclose(whole.loads, pieces.loads)


def test_routing_is_reported_where_it_is_asked_for_and_there_is_some():
    ids = tokens(1, 9)
    plain = mom()(ids)
    assert plain.balance_loss is None
    assert plain.loads is None
    without = mom(layer_types=["memory"] * 3).train()(ids, labels=ids, output_routing=True)
    assert without.balance_loss is None
    assert without.loads is None
    assert without.loss.isfinite()
    one = mom(**MIXED)(ids, output_routing=True)
    assert one.loads.shape == (1, 3)
    masked = mom()(ids, attention_mask=torch.zeros_like(ids), output_routing=True)
    assert masked.balance_loss is None


def test_a_few_steps_of_training_lower_the_loss():
    model, ids = mom(**MIXED).float().train(), tokens(4, LONG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "gla"}, {"num_memories": 4}, {"top_k": 1}, {"shared_memory": False}, {"num_heads": 4}, {"head_dim": 4},
        {"value_dim": 4}, {"layer_types": ["mom", "memory", "mom"]}, {"layer_types": ["mom", "full_attention", "mom"]},
        {"layer_types": ["mom", "sliding_attention", "mom"], "sliding_window": 4}, {"conv_size": 2}, {"conv_size": 0},
        {"single_kv_proj": True}, {"capacity": 0.3}, {"norm_eps": 0.1},
        {"output_gate": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_result(options):
    ids = tokens(1, LONG)
    assert not torch.allclose(logits_of(mom(), ids), logits_of(mom(**options), ids), atol=1e-4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rule": "gsa", "num_slots": 4}, {"rule": "gsa", "num_slots": 6}),
        ({"rule": "ttt"}, {"rule": "ttt", "rule_options": {"mini_batch_size": 3}}),
        (MIXED, MIXED | {"sliding_window": 3}),
    ],
    ids=["num_slots", "rule_options", "sliding_window"],
)
def test_every_option_of_some_models_changes_the_result(one, other):
    ids = tokens(1, LONG)
    assert not torch.allclose(logits_of(mom(**one), ids), logits_of(mom(**other), ids), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 1}, {"capacity": 1.0}, {"dispatch": "dense"}, {"dispatch": "packed"}, {"dispatch": "in_turn"},
        {"form": "recurrent"}, {"form": "chunkwise"},
    ],
    ids=str,
)  # fmt: skip
def test_how_a_result_is_computed_does_not_change_it(options):
    model, other, ids = mom(), mom(**options), tokens(2, LONG)
    layer = other.memory_layers[0]
    for name, value in options.items():
        assert getattr(layer.router if name == "capacity" else layer, name) == value
    expected, found = (logits_of(m, ids, attention_mask=ragged(ids))[ragged(ids).bool()] for m in (model, other))
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_the_two_balance_losses_differ():
    ids, found = tokens(2, LONG), []
    for kind in ("global", "layer"):
        found.append(mom(balance_loss=kind)(ids, output_routing=True).balance_loss)
    assert (found[0] - found[1]).abs() > 1e-3


# Long inputs


def count_calls(model: MoMForCausalLM) -> list[int]:
    widths: list[int] = []
    model.memory_layers[0].register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    return widths


@pytest.mark.parametrize("options", [{}, MIXED, HYBRID], ids=["mom", "sliding hybrid", "full hybrid"])
def test_a_long_text_is_read_in_pieces_where_no_gradient_is_wanted(options, monkeypatch):
    model, ids = mom(**options), tokens(2, LONG)
    widths = count_calls(model)
    whole = logits_of(model, ids, attention_mask=ragged(ids))
    last = logits_of(model, ids, attention_mask=ragged(ids), logits_to_keep=1)
    assert widths == [LONG] * 2
    widths.clear()
    monkeypatch.setattr(modeling_mom, "_CALL_LENGTH", 8)
    pieces = logits_of(model, ids, attention_mask=ragged(ids))
    assert len(widths) == 4
    assert max(widths) == 8
    real = ragged(ids).bool()
    assert (pieces - whole)[real].abs().max() < 1e-6 * whole.abs().max()
    assert (logits_of(model, ids, attention_mask=ragged(ids), logits_to_keep=1) - last).abs().max() < 1e-6
    widths.clear()
    model(ids, attention_mask=ragged(ids))  # with a gradient
    assert widths == [LONG]


def test_texts_of_thousands_of_tokens_are_bounded_by_pieces_of_4096():
    model = mom(llama_config(num_hidden_layers=1), rule="linear_attention", head_dim=4, num_memories=2, top_k=1)
    ids, widths = tokens(1, 5000), count_calls(model)
    pieces = logits_of(model, ids, logits_to_keep=3)
    assert widths == [4096, 904]
    whole = model(ids, logits_to_keep=3).logits.detach()
    assert widths[2:] == [5000]
    assert (pieces - whole).abs().max() < 1e-6 * whole.abs().max()


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 3, LONG - 1]), torch.tensor([5, 5, 2])], ids=str)
def test_the_logits_kept_are_those_of_the_columns_asked_for(keep):
    model, ids = mom(**MIXED), tokens(2, LONG)
    wanted = torch.arange(LONG)[-keep:] if isinstance(keep, int) else keep
    assert torch.allclose(logits_of(model, ids, logits_to_keep=keep), logits_of(model, ids)[:, wanted], atol=1e-12)


# Named mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 4}, "top_k=4 exceeds num_memories=3; lower top_k or add memories"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"num_memories": 0}, "num_memories must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"value_dim": 0}, "value_dim must be at least 1"),
        ({"num_slots": 0}, "num_slots must be at least 1"),
        ({"conv_size": -1}, r"conv_size must be at least 0 \(no convolution\), got -1"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"initial_output": -1.0}, "initial_output must be at least 0, or null, got -1.0"),
        ({"capacity": 0.0}, "capacity must be above 0"),
        ({"capacity": -1}, "capacity must be above 0"),
        ({"balance_loss": "local"}, "balance_loss must be one of global, layer, got 'local'"),
        ({"balance_weight": -0.1}, "balance_weight must be at least 0, got -0.1"),
        ({"dispatch": "fast"}, "dispatch must be one of auto, packed, in_turn, dense, got 'fast'"),
        ({"layer_types": ["mom", "memory", "mem"]}, "layer_types must be among mom, memory, .*, got 'mem'"),
        ({"layer_types": ["mom"]}, "layer_types names 1 blocks, the base has 3; give one entry per block"),
        ({"layer_types": ["mom", "sliding_attention", "mom"]}, "sliding_attention, which needs a sliding_window"),
        ({"sliding_window": 4}, "sliding_window is given, but layer_types has no sliding_attention"),
        (MIXED | {"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"num_memory": 4}, "did you mean num_memories"),
        ({"rule": "gated_deltanet"}, "no update rule is called 'gated_deltanet'; did you mean 'gated_delta_net'"),
        ({"rule": "gla", "rule_options": {"mini_batch_size": 4}}, "gla: unknown setting 'mini_batch_size'"),
        ({"form": "fast"}, "form must be one of auto, recurrent, chunkwise, fla, got 'fast'"),
        ({"rule": "ttt", "value_dim": 4}, "ttt needs value_dim = head_dim = 8, got 4"),
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        MoMForCausalLM(mom_config(**options))
    assert "\n" not in str(caught.value)


def test_a_foreign_memory_is_never_used():
    model, ids = mom(), tokens(2, 9)

    def state_of(other: MemoryModel) -> MemoryState:
        with torch.no_grad():
            return other(ids, use_cache=True).past_key_values.state

    with torch.no_grad():
        own = state_of(model)
        strangers = [
            mom(llama_config(num_hidden_layers=2)), mom(**MIXED), mom(num_memories=4), mom(rule="gsa"), mom(head_dim=4),
            mom(shared_memory=False), mom(conv_size=0), mom(rule="mamba2"), lm2_on_mom(), mom().float(),
            mom(layer_types=["memory"] * 3),
        ]  # fmt: skip
        for stranger in strangers:
            with pytest.raises(StateError, match=r"of another model|belongs to another layer") as caught:
                model(ids, past_key_values=MemoryCache(state_of(stranger)))
            assert "\n" not in str(caught.value)
        first = mom(layer_types=["full_attention", "mom", "mom"])
        with pytest.raises(StateError, match=r"of another model: block 0 \(attention\) keeps no \[2, 4, 3, 48\]"):
            first(ids, past_key_values=MemoryCache(state_of(mom(layer_types=["mom", "full_attention", "mom"]))))
        with pytest.raises(StateError, match=r"block 0 \(memory\) keeps no \[2, 5, 3, 48\]"):
            lm2_on_mom()(ids, past_key_values=MemoryCache(state_of(lm2_on_mom(num_memories=4))))
        with pytest.raises(StateError, match="holds 2 rows, the input has 3"):
            model(tokens(3, 4), past_key_values=MemoryCache(own))
        with pytest.raises(StateError, match="cannot be combined"):
            model.generate(ids, memory=own, use_cache=False)
        with pytest.raises(StateError, match="past_key_values must be a MemoryCache, got DynamicCache"):
            model(ids, past_key_values=DynamicCache())


def test_the_base_alone_reads_a_text_and_keeps_no_memory():
    model, ids = mom(), tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(model.base(ids, use_cache=False).logits, logits_of(model, ids))
        with pytest.raises(StateError, match="a memory cannot be kept in a DynamicCache; call the whole model"):
            model.base(ids, use_cache=True)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.tensor([[3, 50]]), "token id 50 is outside the vocabulary"),
        (torch.zeros(1, 0, dtype=torch.long), "tokens >= 1"),
        (torch.tensor([[1.5]]), "must be integers"),
    ],
    ids=["too large", "empty", "float"],
)
def test_bad_inputs_are_refused_by_name(inputs, message):
    with pytest.raises(ShapeError, match=message):
        mom()(inputs)


def test_a_copied_model_works_on_its_own():
    model, ids = mom(**MIXED), tokens(1, LONG)
    expected = logits_of(model, ids)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(other, ids), expected)


def test_an_lm2_bank_changes_no_logit_of_the_mom_model_it_is_put_on():
    from mnemon.models.modeling_lm2 import LM2ForCausalLM

    model, ids = mom(**MIXED), tokens(2, LONG)
    expected = logits_of(model, ids)
    grafted = LM2ForCausalLM.from_base(model, num_slots=5, slot_dim=8, segment_length=7)
    assert (logits_of(grafted, ids) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert torch.equal(logits_of(model, ids), expected)
