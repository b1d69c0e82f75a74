"""A memory is used by the weights that made it and by no others, whatever happened to the model in between."""

import copy
import gc
import pickle

import peft
import pytest
import torch
from lm2_cases import llama_config, lm2, tokens
from mom_cases import lm2_on_mom, mom
from rmt_cases import rmt
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mnemon.errors import StateError
from mnemon.models.memory_model import MemoryModel
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.provenance import _described, model_fingerprint
from mnemon.models.registration import register
from mnemon.models.state import MemoryCache, MemoryState

IDS = tokens(1, 24)
GENERATION = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
BUILDERS = {
    "lm2": lambda seed=0: lm2(llama_config(), seed, attention_span=9),
    "mom": lambda seed=0: mom(seed=seed),
    "rmt": lambda seed=0: rmt(llama_config(), seed=seed),
    "armt": lambda seed=0: rmt(llama_config(), "armt", seed=seed),
    "lm2-on-mom": lambda seed=0: lm2_on_mom(seed=seed),
}
every_family = pytest.mark.parametrize("name", BUILDERS)


def uses(model: MemoryModel, state: MemoryState, path=None) -> dict:
    """Return every way to use a state, by name."""
    ways = {
        "generate(memory=)": lambda: model.generate(IDS, memory=state, **GENERATION),
        "generate(past_key_values=)": lambda: model.generate(IDS, past_key_values=MemoryCache(state), **GENERATION),
        "memorize": lambda: model.memorize(IDS, state=state),
    }
    if path is not None:
        ways["save"] = lambda: state.save(path)
    return ways


def refuses(model: MemoryModel, state: MemoryState, message: str, path=None) -> None:
    for name, use in uses(model, state, path).items():
        with pytest.raises(StateError, match=message):
            use()
        assert path is None or not path.exists(), name


def forward(model: MemoryModel, state: MemoryState) -> MemoryState:
    with torch.no_grad():
        return model(IDS, past_key_values=MemoryCache(state)).past_key_values.state


def step(model: MemoryModel) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()(IDS, labels=IDS).loss.backward()
    optimiser.step()
    model.eval()


@every_family
def test_another_model_of_the_same_shapes_refuses(name):
    mine, other = BUILDERS[name](), BUILDERS[name](1)
    state = mine.memorize(IDS)
    refuses(other, state, r"memory is of another model: it was made by \w+ [0-9a-f]{16}, this is \w+ [0-9a-f]{16}")
    with pytest.raises(StateError, match="of another model"):
        forward(other, state)


@every_family
def test_the_same_model_after_a_training_step_refuses(name, tmp_path):
    model = BUILDERS[name]()
    state = model.memorize(IDS)
    step(model)
    refuses(model, state, "before the model's weights changed", tmp_path / "a.safetensors")
    assert model.generate(IDS, memory=model.memorize(IDS), **GENERATION).shape[1] > 0


@every_family
def test_a_training_loop_carries_a_state_over_steps_but_its_memory_is_not_that_of_the_trained_model(name):
    model = BUILDERS[name]()
    with torch.no_grad():
        state = model(IDS, use_cache=True).past_key_values.state
    step(model)
    carried = forward(model, state)
    assert carried.tokens_read == (48,)
    refuses(model, carried, "before the model's weights changed")


def test_a_state_from_forward_counts_as_one_from_memorize():
    model = BUILDERS["lm2"]()
    with torch.no_grad():
        state = model(IDS, use_cache=True).past_key_values.state
    for use in uses(model, state).values():
        use()
    with pytest.raises(StateError, match="of another model"):
        BUILDERS["lm2"](1).generate(IDS, memory=state, **GENERATION)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.base.lm_head.weight.data.mul_(1.5),  # no counter sees this one
        lambda model: model.load_state_dict(BUILDERS["lm2"](1).state_dict()),
        lambda model: setattr(model.base.lm_head, "weight", torch.nn.Parameter(model.base.lm_head.weight * 1.5)),
        lambda model: model.banks[1].output.weight.detach().zero_(),
        lambda model: model.float(),
        lambda model: model.resize_token_embeddings(60),
        lambda model: torch.nn.init.zeros_(model.base.model.norm.weight),
    ],
    ids=["data", "load_state_dict", "replaced", "one tensor", "dtype", "resized", "reset"],
)
def test_every_way_to_change_weights_is_noticed(change):
    model = BUILDERS["lm2"]()
    state = model.memorize(IDS)
    change(model)
    refuses(model, state, "before the model's weights changed|of another model")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_adding_merging_and_switching_off_lora_is_noticed():
    model = BUILDERS["lm2"]()
    plain = model.memorize(IDS)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    refuses(model, plain, "before the model's weights changed")
    state = model.memorize(IDS)
    with wrapped.disable_adapter():
        refuses(model, state, "before the model's weights changed")
    assert model.memorize(IDS, state=state).tokens_read == (48,)
    wrapped.merge_adapter()
    refuses(model, state, "before the model's weights changed")
    wrapped.unmerge_adapter()
    wrapped.merge_and_unload()
    refuses(model, state, "before the model's weights changed")


def test_two_lora_adapters_on_one_base_are_two_models():
    prints = []
    for seed in (0, 1):
        model = BUILDERS["lm2"]()
        torch.manual_seed(seed)
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        prints.append(model_fingerprint(model))
    assert prints[0] != prints[1]


@every_family
def test_equal_weights_in_another_object_are_the_same_model(name, tmp_path):
    register()
    model = BUILDERS[name]()
    state = model.memorize(IDS)
    expected = model.generate(IDS, memory=state, **GENERATION)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for twin in (copy.deepcopy(model), loaded):
        assert model_fingerprint(twin) == model_fingerprint(model)
        assert torch.equal(twin.generate(IDS, memory=state, **GENERATION), expected)
        again = forward(twin, state)
        assert again.origin.model is twin


def test_a_memory_on_a_pretrained_base_is_one_model_however_it_is_loaded(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "base")
    grafted = LM2ForCausalLM.from_base(tmp_path / "base", freeze_base=True, num_slots=4, segment_length=8)
    grafted.save_adapter(tmp_path / "adapter")
    grafted.save_pretrained(tmp_path / "whole")
    found = {
        model_fingerprint(model)
        for model in (
            grafted,
            LM2ForCausalLM.from_adapter(tmp_path / "adapter"),
            LM2ForCausalLM.from_pretrained(tmp_path / "whole"),
        )
    }
    assert len(found) == 1


def test_options_that_change_what_is_computed_change_the_fingerprint():
    model = BUILDERS["lm2"]()
    before = model_fingerprint(model)
    other = lm2(llama_config(), attention_span=10)
    other.load_state_dict(model.state_dict())
    assert model_fingerprint(other) != before
    rope = lm2(llama_config(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), attention_span=9)
    rope.load_state_dict(model.state_dict())
    assert model_fingerprint(rope) != before


FIRST_OPTIONS = {
    "lm2": "blocks_path attention_name num_slots slot_dim num_memory_heads segment_length flow memory_layers "
    "attention_span attention_sinks read_top_k retention gate_stretch bptt_segments",
    "mom": "blocks_path attention_name rule num_memories top_k shared_memory num_heads head_dim value_dim layer_types "
    "sliding_window conv_size norm_eps output_gate num_slots single_kv_proj capacity balance_loss balance_weight "
    "rule_options form dispatch",
    "rmt": "blocks_path attention_name memory num_memory_tokens segment_length key_dim feature_order bptt_segments",
}


@pytest.mark.parametrize("name", FIRST_OPTIONS)
def test_an_option_that_is_new_and_not_used_leaves_saved_memories_valid(name):
    assert list(_described(BUILDERS[name]().config)["own"]) == FIRST_OPTIONS[name].split()


def test_an_option_that_is_new_and_used_changes_the_fingerprint():
    for name, value in {"skip_gate": True, "coupled_gates": True, "write_query": "key", "write_conv": 4}.items():
        assert _described(lm2(llama_config(), **{name: value}).config)["own"][name] == value
    assert _described(rmt(llama_config(), "armt", gate_stretch=0.1).config)["own"]["gate_stretch"] == 0.1


def test_how_a_memory_began_says_nothing_about_the_model():
    for build in (lm2, lambda config, **options: mom(config, **options)):
        first, second = (build(llama_config(), initial_output=scale).config for scale in (0.0, 1.0))
        assert _described(first) == _described(second)


def test_moving_a_model_keeps_its_memories_valid():
    model = BUILDERS["lm2"]()
    state = model.memorize(IDS)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # what moving to another device does
    assert pointers != [parameter.data_ptr() for parameter in model.parameters()]
    for use in uses(model, state).values():
        use()
    model.to("cpu")
    model.requires_grad_(False)
    for use in uses(model, state).values():
        use()


def test_the_fingerprint_is_not_computed_again_while_nothing_changed(monkeypatch):
    model = BUILDERS["lm2"]()
    state = model.memorize(IDS)
    first = model_fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr("mnemon.models.provenance.fingerprint", lambda _: pytest.fail("computed again"))
        assert model_fingerprint(model) == first
        for use in uses(model, state).values():
            use()
        step(model)
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            model_fingerprint(model)
    assert model_fingerprint(model) != first


def test_a_forward_pass_compares_nothing_but_the_object(monkeypatch):
    model = BUILDERS["lm2"]()
    state = model.memorize(IDS)
    monkeypatch.setattr("mnemon.models.provenance.stamp_of", lambda _: pytest.fail("looked at the weights"))
    forward(model, state)


def test_a_state_without_a_model_says_so(tmp_path):
    model = BUILDERS["lm2"]()
    state = model.memorize(IDS)
    twin = copy.deepcopy(model)
    saved = state.save(tmp_path / "a.safetensors")
    del model
    gc.collect()
    with pytest.raises(StateError, match="which is gone or has changed"):
        twin.memorize(IDS, state=state)
    with pytest.raises(StateError, match="is gone, so its file could not name it"):
        state.save(tmp_path / "b.safetensors")
    assert twin.memorize(IDS, state=MemoryState.load(saved)).tokens_read == (48,)


def test_a_state_of_no_origin_is_refused():
    model = BUILDERS["lm2"]()
    with pytest.raises(StateError, match="does not say which model made it"):
        forward(model, model._blank_state(1))
    with pytest.raises(StateError, match="does not say which model made it"):
        model._blank_state(1).save("never")


def test_copies_and_pickles_of_a_state_keep_its_origin():
    model, other = BUILDERS["lm2"](), BUILDERS["lm2"](1)
    state = model.memorize(IDS)
    expected = model.generate(IDS, memory=state, **GENERATION)
    for again in (copy.deepcopy(state), copy.copy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(model.generate(IDS, memory=again, **GENERATION), expected)
        with pytest.raises(StateError, match="of another model"):
            other.memorize(IDS, state=again)
    cache = copy.deepcopy(MemoryCache(state))  # how a prompt's cache is used again
    assert torch.equal(model.generate(IDS, past_key_values=cache, **GENERATION), expected)
    step(model)
    with pytest.raises(StateError, match="cannot be sent to another process"):
        pickle.dumps(state)


def test_states_of_one_model_before_and_after_training_are_not_put_side_by_side():
    model = BUILDERS["lm2"]()
    before = model.memorize(IDS)
    step(model)
    with pytest.raises(StateError, match="made by different weights"):
        MemoryState.stack([before, model.memorize(IDS)])
