"""LM2 beyond the contracts: every option acts, the graft is exact, gradients flow and are cut, mistakes are named."""

import copy

import numpy as np
import pytest
import torch
from lm2_cases import SEGMENT, TOLERANCE, VOCABULARY, lfm2_config, llama_config, lm2, tokens
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    MambaConfig,
    OpenAIGPTConfig,
    T5Config,
    TrOCRConfig,
    ViTConfig,
)

from mnemon import MoMConfig  # by its public name, which makes it known to the library's Auto classes
from mnemon.errors import BackendUnavailable, ConfigError, MnemonError, ShapeError, StateError
from mnemon.layers.memory_bank import MemoryBank
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.masks import as_attention_mask
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.state import MemoryCache

LONG = 4 * SEGMENT + 3


def final_logits(model: LM2ForCausalLM, ids: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits[:, -1]


@pytest.mark.parametrize(
    "options",
    [
        {"num_slots": 6}, {"slot_dim": 15}, {"num_memory_heads": 4}, {"segment_length": 8}, {"flow": "layer"},
        {"memory_layers": [0]}, {"attention_span": 9}, {"attention_span": 9, "attention_sinks": 2},
        {"read_top_k": 2}, {"retention": 0.99}, {"gate_stretch": 0.1},
        {"skip_gate": True}, {"coupled_gates": True}, {"write_query": "bank"}, {"write_query": "key"},
        {"write_conv": 3},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_every_option_changes_the_result(options):
    ids = tokens(1, LONG)
    assert not torch.allclose(
        final_logits(lm2(llama_config()), ids), final_logits(lm2(llama_config(), **options), ids), atol=1e-9
    )


def test_a_fresh_memory_can_begin_by_adding_nothing_and_learns_from_the_first_step_on():
    ids = tokens(2, 2 * SEGMENT)
    silent, half, full = (lm2(llama_config(), initial_output=scale) for scale in (0.0, 0.5, 1.0))
    for quiet, medium, loud in zip(silent.banks, half.banks, full.banks, strict=True):
        assert not quiet.output.weight.any()
        assert torch.equal(medium.output.weight, 0.5 * loud.output.weight)
        assert torch.equal(medium.read_query.weight, loud.read_query.weight)
    assert torch.equal(silent(ids).logits, silent(ids, knock_out_memory=True).logits)
    silent(ids, labels=ids).loss.backward()
    assert all(bank.output.weight.grad.any() for bank in silent.banks)


@pytest.mark.parametrize("beside_memories", [False, True])
def test_by_default_a_fresh_memory_adds_about_as_much_as_an_embedding_has(beside_memories):
    base = llama_config(hidden_size=64, initializer_range=0.05)
    if beside_memories:
        base = MoMConfig(base_config=base, num_heads=2, head_dim=16)
    for bank in LM2ForCausalLM(LM2Config(base_config=base, slot_dim=64)).banks:
        assert bank.output.weight.std().item() * 8 == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("flow", ["depth", "layer"])
def test_bptt_segments_cuts_the_gradient_and_nothing_else(flow):
    ids = tokens(1, 4 * SEGMENT)
    whole, cut = lm2(llama_config(), flow=flow), lm2(llama_config(), flow=flow, bptt_segments=1)
    cut.load_state_dict(whole.state_dict())
    gradients = []
    for model in (whole, cut):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        logits[:, -1].sum().backward()
        gradients.append((logits.detach(), embedded.grad))
    same = torch.equal if flow == "depth" else torch.allclose  # whole, a bank per block takes all segments in one call
    assert same(gradients[0][0], gradients[1][0])
    old = slice(0, 3 * SEGMENT)
    assert gradients[0][1][:, old].abs().max() > 0
    assert gradients[1][1][:, old].abs().max() == 0
    assert torch.equal(gradients[1][1][:, 3 * SEGMENT :] != 0, gradients[0][1][:, 3 * SEGMENT :] != 0)


@pytest.mark.parametrize("flow", ["depth", "layer"])
@pytest.mark.parametrize("stretch", [0.0, 0.1])
@pytest.mark.parametrize("skip_gate", [False, True], ids=["no skip gate", "skip gate"])
@pytest.mark.parametrize("retention", [0.02, 0.83])
def test_retention_is_the_share_of_the_bank_one_pass_keeps_at_initialisation(flow, stretch, skip_gate, retention):
    torch.manual_seed(0)
    options = {"segment_length": SEGMENT, "retention": retention, "flow": flow, "gate_stretch": stretch}
    model = LM2ForCausalLM(LM2Config(base_config=llama_config(), skip_gate=skip_gate, **options))
    with torch.no_grad():
        state = model(tokens(2, SEGMENT), use_cache=True).past_key_values.state
    assert torch.allclose(state.kept, torch.full_like(state.kept, retention), atol=1e-6)


@pytest.mark.parametrize("build", [llama_config, lfm2_config])
def test_a_fresh_graft_changes_no_bit_within_the_first_segment(build):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(build()).eval()
    ids = tokens(2, 3 * SEGMENT)
    with torch.no_grad():
        first, whole = base(ids[:, :SEGMENT]).logits, base(ids).logits
        grafted = LM2ForCausalLM.from_base(base, num_slots=5, slot_dim=8, segment_length=SEGMENT)
        assert torch.equal(grafted(ids[:, :SEGMENT]).logits, first)
        assert torch.allclose(grafted(ids).logits, whole, atol=1e-5)
        assert torch.equal(base(ids).logits, whole)  # the decoder itself is untouched


def test_grafting_keeps_every_weight_of_a_loaded_decoder(tmp_path):
    AutoModelForCausalLM.from_config(llama_config()).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    grafted = LM2ForCausalLM.from_base(str(tmp_path), segment_length=SEGMENT)
    LM2ForCausalLM.from_base(base, segment_length=SEGMENT)
    for name, tensor in before.items():
        assert torch.equal(base.state_dict()[name], tensor)
        assert torch.equal(grafted.base.state_dict()[name], tensor)


def test_no_memory_layers_is_the_plain_decoder_with_a_window():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(llama_config()).double().eval()
    ids = tokens(1, LONG)
    plain = LM2ForCausalLM.from_base(base, memory_layers=[], segment_length=SEGMENT)
    windowed = LM2ForCausalLM.from_base(
        base, memory_layers=[], segment_length=SEGMENT, attention_span=8, attention_sinks=0
    )
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in base.parameters())
    with torch.no_grad():
        expected = base(ids).logits
        assert (plain(ids).logits - expected).abs().max() < TOLERANCE
        assert (windowed(ids).logits[:, :8] - expected[:, :8]).abs().max() < TOLERANCE
        assert (windowed(ids).logits[:, -1] - expected[:, -1]).abs().max() > 1e-4


def test_a_span_hides_older_tokens_from_attention():
    model = lm2(llama_config(), memory_layers=[], attention_span=9)
    ids = tokens(1, LONG)
    other = ids.clone()
    receptive_field = 3 * (9 - 1)  # three blocks, each looking 8 tokens back
    other[:, : LONG - 1 - receptive_field] = 3
    assert torch.equal(final_logits(model, ids), final_logits(model, other))


def test_knocking_out_the_memory_equals_a_model_without_one():
    model = lm2(lfm2_config(), attention_span=9)
    bare = lm2(lfm2_config(), attention_span=9, memory_layers=[])
    bare.base.load_state_dict(model.base.state_dict())
    ids = tokens(2, LONG)
    assert torch.equal(final_logits(model, ids, knock_out_memory=True), final_logits(bare, ids))
    assert not torch.allclose(final_logits(model, ids), final_logits(bare, ids))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, knock_out_memory=True, **options), bare.generate(ids, **options))


@pytest.mark.parametrize("flow", ["depth", "layer"])
def test_every_parameter_gets_a_gradient(flow):
    model = lm2(lfm2_config(), flow=flow)
    ids = tokens(2, LONG)
    model(ids, labels=ids).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # In flow "layer" nothing reads the last update of a bank before the text ends; all parameters still act.
    assert without == []


@pytest.mark.parametrize("flow", ["depth", "layer"])
@pytest.mark.parametrize("stretch", [0.0, 0.1])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_training_with_joined_banks_is_training_with_each_on_its_own(flow, stretch, checkpointed, monkeypatch):
    model = lm2(llama_config(), flow=flow, gate_stretch=stretch).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    ids, mask = tokens(2, 4 * SEGMENT + 3), torch.ones(2, 4 * SEGMENT + 3, dtype=torch.long)
    mask[1, :5] = 0  # the rows complete their segments in different calls

    def step() -> list[torch.Tensor]:
        output = model(ids, attention_mask=mask, use_cache=True)
        bank = output.past_key_values.state.bank
        loss = output.logits[mask.bool()].square().mean() + bank.square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [output.logits[mask.bool()], bank, output.past_key_values.state.kept, *gradients]

    joined = step()
    monkeypatch.setattr("mnemon.models.memory_segments.can_be_joined", lambda banks: False)
    for one, other in zip(joined, step(), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def skipping(**options) -> LM2ForCausalLM:
    """A model with skip gates that are not at their neutral start."""
    model = lm2(llama_config(), skip_gate=True, **options)
    for bank in model.banks:
        bank.skip_gate.weight.data.normal_()
    return model


@pytest.mark.parametrize("flow", ["depth", "layer"])
def test_the_rate_of_writing_is_the_mean_over_rows_updates_and_slots(flow, monkeypatch):
    model, ids = skipping(flow=flow), tokens(2, 4 * SEGMENT + 3)
    mask = torch.ones_like(ids)
    mask[1, : SEGMENT + 2] = 0  # fewer segments, completed in other calls
    seen: list[torch.Tensor] = []
    update = MemoryBank.update

    def watched(bank, *arguments):
        updated, gates = update(bank, *arguments)
        seen.append(gates.rate.mean())
        return updated, gates

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(MemoryBank, "update", watched)
        for row in ids[:1], ids[1:, SEGMENT + 2 :]:
            model(row)
    with torch.no_grad():
        rate = model(ids, attention_mask=mask, output_write_rate=True).write_rate
        assert model(ids, attention_mask=mask).write_rate is None
    assert len(seen) == len(model.banks) * (4 + 3)
    assert rate.item() == pytest.approx(torch.stack(seen).mean().item(), rel=TOLERANCE)
    with pytest.raises(ConfigError, match="output_write_rate needs skip_gate"):
        lm2(llama_config())(ids, output_write_rate=True)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_training_pays_for_writing_and_nothing_else_does(checkpointed):
    ids = tokens(2, 4 * SEGMENT + 3)
    free, paying = skipping(), skipping(write_cost=0.5)
    paying.load_state_dict(free.state_dict())
    losses = {}
    for name, model in (("free", free), ("paying", paying)):
        with torch.no_grad():
            losses[name] = model(ids, labels=ids).loss
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
    assert torch.equal(losses["free"], losses["paying"])

    found = paying(ids, labels=ids, output_write_rate=True)
    expected = free(ids, labels=ids, output_write_rate=True)
    loss = expected.loss + 0.5 * expected.write_rate.to(expected.loss.dtype)
    torch.testing.assert_close(found.loss, loss)
    paid = torch.autograd.grad(found.loss, list(paying.parameters()))
    for one, other in zip(paid, torch.autograd.grad(loss, list(free.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=1e-9)
    rate = paying(ids, output_write_rate=True).write_rate
    gradient = torch.autograd.grad(rate, [bank.skip_gate.bias for bank in paying.banks])
    assert all(part.item() > 0 for part in gradient)


def test_eager_and_sdpa_attention_agree_on_ragged_rows_with_a_span():
    model = lm2(llama_config(), attention_span=9)
    ids = tokens(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        sdpa = model(ids, attention_mask=mask).logits
        eager_model = copy.deepcopy(model)
        eager_model.set_attn_implementation("eager")
        eager = eager_model(ids, attention_mask=mask).logits
    real = mask.bool()
    # The eager softmax runs in float32, over three blocks and five segments.
    assert (sdpa - eager)[real].abs().max() < 2e-5


def test_an_attention_without_masks_is_refused_where_a_mask_is_needed():
    seen = np.zeros((1, 2, 3), dtype=bool)
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(BackendUnavailable, match="use sdpa or eager"):
            as_attention_mask(seen, (2, 3), name, torch.float32, torch.device("cpu"))


def test_a_copied_model_works_on_its_own():
    model = lm2(lfm2_config())
    ids = tokens(1, LONG)
    expected = final_logits(model, ids)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(final_logits(other, ids), expected)


def test_bfloat16_models_keep_bank_and_statistics_in_float32():
    model = lm2(lfm2_config()).to(torch.bfloat16)
    with torch.no_grad():
        output = model(tokens(2, LONG), use_cache=True)
    state = output.past_key_values.state
    assert output.logits.dtype == torch.bfloat16
    assert output.logits.isfinite().all()
    assert {state.bank.dtype, *(part.dtype for entry in state.statistics for part in entry.tensors)} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots must be at least 1"),
        ({"segment_length": 0}, "segment_length must be at least 1"),
        ({"slot_dim": 10, "num_memory_heads": 4}, "not divisible"),
        ({"attention_span": 3, "segment_length": 7}, "neither attention nor bank"),
        ({"flow": "sideways"}, "flow must be one of depth, layer"),
        ({"gate_stretch": 1.0}, "gate_stretch must be at least 0 and below 1"),
        ({"write_query": "slot"}, "write_query must be one of both, bank, key"),
        ({"write_cost": 0.1}, "together with skip_gate"),
        ({"write_cost": -0.1, "skip_gate": True}, "write_cost must be 0, or above 0"),
        ({"write_conv": 1}, "0 .no convolution. or at least 2"),
        ({"retention": 1.0}, "strictly between 0 and 1"),
        ({"read_top_k": 99}, "exceeds num_slots"),
        ({"memory_layers": [7]}, "blocks 0 to 2"),
        ({"memory_layers": [1, 1]}, "twice"),
        ({"bptt_segments": 0}, "bptt_segments must be at least 1"),
        ({"initial_output": -0.5}, "initial_output must be at least 0, or null, got -0.5"),
        ({"attention_sinks": 4}, "needs an attention_span"),
        ({"attention_sinks": -1}, "attention_sinks must be at least 0"),
        ({"num_slotz": 4}, "did you mean num_slots"),
        ({"num_slots": 3, "slot_dim": 1, "num_memory_heads": 1}, "slot_dim of at least 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_bad_configuration_is_refused_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LM2Config(base_config=llama_config(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("base_config", "message"),
    [
        (T5Config(), "encoder-decoder"),
        (Gemma3Config(), "more than text"),
        (BloomConfig(n_layer=2, n_head=2, hidden_size=16, vocab_size=50), "cannot tell the positions"),
        (
            TrOCRConfig(decoder_layers=2, decoder_attention_heads=2, d_model=16, decoder_ffn_dim=16, vocab_size=50),
            "takes no position_ids",
        ),
        (OpenAIGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=50), "takes no past_key_values"),
        (MambaConfig(num_hidden_layers=2, hidden_size=16, vocab_size=50), "state of a linear_attention block"),
        (GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, add_cross_attention=True), "encoder to attend to"),
        (llama_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (ViTConfig(), "no vocab_size"),
        ({"hidden_size": 3}, "needs the key model_type"),
        ({"model_type": "nothing"}, "base_config: "),
    ],
    ids=["encoder-decoder", "multi-modal", "alibi", "own positions", "no cache", "mamba", "cross attention",
         "dynamic rope", "vision", "no type", "unknown type"],
)  # fmt: skip
def test_a_decoder_that_cannot_take_a_memory_is_refused_with_the_reason(base_config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LM2ForCausalLM(LM2Config(base_config=base_config))
    assert "\n" not in str(caught.value)


def test_a_memory_on_a_block_without_attention_is_refused():
    with pytest.raises(ConfigError, match=r"block 0, which has no attention; blocks with one: \[1, 3\]"):
        lm2(lfm2_config(), memory_layers=[0, 1])


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.tensor([[3, VOCABULARY]]), ShapeError, f"token id {VOCABULARY} is outside the vocabulary"),
        (torch.tensor([[3, -1]]), ShapeError, "token id -1"),
        (torch.zeros(1, 0, dtype=torch.long), ShapeError, "tokens >= 1"),
        (torch.tensor([[1.5]]), ShapeError, "must be integers"),
        (torch.tensor([1, 2]), ShapeError, r"\[batch, tokens >= 1\]"),
    ],
    ids=["too large", "negative", "empty", "float", "no batch"],
)
def test_bad_inputs_are_refused_by_name(inputs, error, message):
    with pytest.raises(error, match=message):
        lm2(llama_config())(inputs)


@pytest.mark.parametrize(
    ("mask", "message"),
    [([[0, 0], [1, 1]], "row 0 of the prompt is fully padded"), ([[1, 0], [1, 1]], "padded on the right")],
)
def test_a_prompt_without_a_last_token_is_refused(mask, message):
    with pytest.raises(ShapeError, match=message):
        lm2(llama_config()).generate(tokens(2, 2), attention_mask=torch.tensor(mask))


def test_a_foreign_memory_is_never_used():
    model, ids = lm2(llama_config()), tokens(2, 9)
    other = lm2(llama_config(), num_slots=4)
    with torch.no_grad():
        state = other(ids, use_cache=True).past_key_values.state
        with pytest.raises(StateError, match="another model"):
            model(ids, past_key_values=MemoryCache(state))
        with pytest.raises(StateError, match="holds 2 rows, the input has 3"):
            other(tokens(3, 4), past_key_values=MemoryCache(state))
        with pytest.raises(StateError, match="cannot be combined"):
            model.generate(ids, memory=state, use_cache=False)


def test_what_a_memory_cannot_do_is_refused():
    model, ids = lm2(llama_config()), tokens(1, 9)
    with pytest.raises(MnemonError, match="cache_implementation"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="assisted"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=4, pad_token_id=0)
    with pytest.raises(StateError, match="rolled back"):
        MemoryCache().memory.crop(-1)
