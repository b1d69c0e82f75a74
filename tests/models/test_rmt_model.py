"""RMT and ARMT beyond the contracts: equal to the slow form, every option acts, gradients are exact, mistakes named."""

import copy
import weakref

import pytest
import torch
from families import FAMILIES, LEARNED_POSITIONS, family
from lm2_cases import SEGMENT, lfm2_config, llama_config, tokens
from mom_cases import mom_config
from rmt_cases import MEMORY_TOKENS, OPTIONS, memory_of, reference_logits, rmt
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config, MambaConfig, T5Config

from mnemon.errors import ConfigError, ShapeError, StateError
from mnemon.models.configuration_rmt import RMTConfig
from mnemon.models.modeling_rmt import RMTForCausalLM
from mnemon.models.parameters import memory_parameters
from mnemon.models.state import MemoryCache

LONG = 3 * SEGMENT + 4
# Rotary bases compute angles and norms in float32, whose roundings differ where products have other shapes.
TOLERANCE = {"gpt2": 1e-12, "gpt_neox": 1e-12}
every_kind = pytest.mark.parametrize("kind", OPTIONS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def assert_close(found: Tensor, expected: Tensor, name: str = "llama") -> None:
    assert (found - expected).abs().max() <= TOLERANCE.get(name, 1e-6) * expected.abs().max().clamp_min(1)


def gradients_of(model: RMTForCausalLM, ids: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the loss for every parameter."""
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, **inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@every_kind
@every_family
def test_logits_are_those_of_plain_calls_segment_by_segment(name, kind):
    model, ids = rmt(family(name), kind), tokens(2, LONG)
    with torch.no_grad():
        assert_close(model(ids).logits, reference_logits(model, ids), name)


def test_writes_that_can_close_are_those_of_the_equations_written_out():
    model, ids = rmt(family("gpt2"), "armt", gate_stretch=0.3).train(), tokens(2, LONG)
    found = model(ids)
    expected = reference_logits(model, ids)
    assert_close(found.logits, expected, "gpt2")
    for name, one, other in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(found.logits.square().sum(), list(model.parameters())),
        torch.autograd.grad(expected.square().sum(), list(model.parameters())),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), name


@every_kind
@every_family
def test_cuts_and_ragged_padding_change_nothing(name, kind):
    model, ids = rmt(family(name), kind), tokens(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache, pieces = None, []
    with torch.no_grad():
        for start, end in ((0, 3), (3, 12), (12, LONG)):
            output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache, pieces = output.past_key_values, [*pieces, output.logits]
        joined = torch.cat(pieces, dim=1)
        for row in range(2):
            real = mask[row].bool()
            assert_close(joined[row][real], reference_logits(model, ids[row : row + 1, real])[0], name)


@every_kind
def test_gradients_are_those_of_plain_calls_segment_by_segment(kind):
    model, ids = rmt(family("gpt2"), kind).train(), tokens(2, LONG)
    found = gradients_of(model, ids)
    model.zero_grad(set_to_none=True)
    logits = reference_logits(model, ids)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        # The loss of the library is computed in float32.
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-6), name


@every_kind
@pytest.mark.parametrize("base", [llama_config, lfm2_config])
def test_recomputing_segments_gives_exactly_the_gradients_of_keeping_them(kind, base):
    ids = tokens(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    model = rmt(base(), kind).train()
    kept = gradients_of(model, ids, attention_mask=mask)
    model.gradient_checkpointing_enable()
    recomputed = gradients_of(model, ids, attention_mask=mask)
    assert kept.keys() == recomputed.keys()
    for name, expected in kept.items():
        assert torch.allclose(recomputed[name], expected, rtol=1e-9, atol=1e-12), name


@every_kind
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("depth", [1, 2, None])
def test_truncation_cuts_the_gradient_at_the_segment_it_names(kind, depth, checkpointed):
    ids = tokens(1, 4 * SEGMENT)
    model = rmt(llama_config(), kind, bptt_segments=depth).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[:, -1].sum().backward()
    reached = embedded.grad.abs().amax(dim=2)[0].split(SEGMENT)
    first = 0 if depth is None else 4 - depth
    assert all(bool(part.any()) == (number >= first) for number, part in enumerate(reached))


@every_kind
def test_every_parameter_gets_a_gradient(kind):
    model = rmt(llama_config(), kind).train()
    gradients = gradients_of(model, tokens(2, LONG))
    assert all(gradients[name].any() for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rmt", {"num_memory_tokens": 2}), ("rmt", {"segment_length": 8}),
        ("rmt", {"memory": "associative"}), ("armt", {"num_memory_tokens": 2}), ("armt", {"segment_length": 8}),
        ("armt", {"key_dim": 3}), ("armt", {"feature_order": 1}), ("armt", {"gate_stretch": 0.3}),
    ],
)  # fmt: skip
def test_every_option_changes_the_result(kind, options):
    ids = tokens(1, LONG)
    with torch.no_grad():
        before = rmt(llama_config(), kind)(ids).logits
        after = rmt(llama_config(), kind, **options)(ids).logits
    assert not torch.allclose(before, after, atol=1e-9)


@every_family
def test_a_new_associative_memory_leaves_every_segment_as_the_decoder_alone_reads_it(name):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(family(name)).double().eval()
    ids = tokens(2, LONG)
    with torch.no_grad():
        alone = [base(part).logits for part in ids.split(SEGMENT, dim=1)]
        model = RMTForCausalLM.from_base(base, memory="associative", segment_length=SEGMENT, num_memory_tokens=2)
        found = model(ids).logits
        # Where nothing is written, not even the shapes of products differ.
        assert torch.equal(model(ids[:, :SEGMENT], use_cache=False).logits, alone[0])
    assert_close(found, torch.cat(alone, dim=1), name)


@every_kind
def test_knocking_out_the_memory_lets_every_segment_begin_like_the_first(kind):
    model, ids = rmt(llama_config(), kind), tokens(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        silenced = model(ids, attention_mask=mask, knock_out_memory=True, use_cache=True)
        for row in range(2):
            real = mask[row].bool()
            alone = [model(part).logits for part in ids[row : row + 1, real].split(SEGMENT, dim=1)]
            assert_close(silenced.logits[row][real], torch.cat(alone, dim=1)[0])
        assert not torch.allclose(silenced.logits[0], model(ids).logits[0], atol=1e-6)
    first = memory_of(model.initial_state(2))
    assert all(torch.equal(*pair) for pair in zip(memory_of(silenced.past_key_values.state), first, strict=True))


@every_kind
def test_memory_is_written_once_per_segment_and_only_when_it_is_complete(kind):
    model, ids = rmt(llama_config(), kind), tokens(1, 2 * SEGMENT + 2)
    model.segmented.prepare()
    widths: list[int] = []
    model.blocks[0].module.register_forward_hook(lambda _, args, output: widths.append(args[0].shape[1]))
    front = MEMORY_TOKENS if kind == "rmt" else 0
    with torch.no_grad():
        model(ids, use_cache=True)
        assert widths == [front + SEGMENT + MEMORY_TOKENS] * 2 + [front + 2]
        widths.clear()
        model(ids[:, : 2 * SEGMENT], use_cache=False)  # nobody goes on from the second segment
        assert widths == [front + SEGMENT + MEMORY_TOKENS, front + SEGMENT]
        widths.clear()
        model.generate(ids[:, :1], max_new_tokens=SEGMENT + 1, min_new_tokens=SEGMENT + 1, pad_token_id=0)
    assert widths == [front + 1] + [1] * (SEGMENT - 2) + [1 + MEMORY_TOKENS, front + 1]


@every_kind
@pytest.mark.parametrize("base", [llama_config, lfm2_config])
def test_what_is_carried_over_a_boundary_is_the_memory_alone(kind, base):
    model, cache, sizes = rmt(base(), kind), None, set()
    with torch.no_grad():
        for step in range(40):
            cache = model(tokens(1, SEGMENT, step), past_key_values=cache, use_cache=True).past_key_values
            sizes.add(cache.state.num_bytes())
            assert not any(cache.state.decoder.base)
    assert sizes == {sum(tensor.numel() * tensor.element_size() for tensor in memory_of(cache.state))}


def living_outputs(kind: str, width: int) -> int:
    """Read a text and return the largest number of block outputs alive at any time."""
    model, alive, peak = rmt(llama_config(), kind), set(), 0

    def note(_: torch.nn.Module, __: tuple, output: Tensor) -> None:
        nonlocal peak
        alive.add(id(output))
        weakref.finalize(output, alive.discard, id(output))
        peak = max(peak, len(alive))

    for block in model.blocks:
        block.module.register_forward_hook(note)
    with torch.no_grad():
        model(tokens(1, width), logits_to_keep=1, use_cache=True)
    return peak


@every_kind
def test_no_activation_outlives_its_segment_however_long_the_input(kind):
    assert living_outputs(kind, 50 * SEGMENT) == living_outputs(kind, 2 * SEGMENT)


def test_the_memory_does_not_hold_on_to_the_segment_it_came_from():
    with torch.no_grad():
        memory = rmt(llama_config())(tokens(1, SEGMENT), use_cache=True).past_key_values.state.memory
    assert memory.untyped_storage().nbytes() == memory.numel() * memory.element_size()


@every_kind
def test_diagnostics_say_how_far_a_segment_moves_the_memory(kind):
    model, ids = rmt(llama_config(), kind), tokens(1, SEGMENT)
    with torch.no_grad():
        output = model(ids, use_cache=True, output_diagnostics=True)
    before, after = (memory_of(state)[0::2] for state in (model.initial_state(1), output.past_key_values.state))
    change = [((new - old).norm() / new.norm()).item() for old, new in zip(before, after, strict=True)]
    rms = [new.square().mean().sqrt().item() for new in after]
    assert output.diagnostics["memory_change"].item() == pytest.approx(sum(change) / len(change), rel=1e-5)
    assert output.diagnostics["memory_rms"].item() == pytest.approx(sum(rms) / len(rms), rel=1e-5)
    assert model(ids).diagnostics is None


@every_kind
def test_a_ragged_batch_with_a_row_that_stands_still_keeps_a_bounded_state(kind):
    model, widths, cache = rmt(llama_config(), kind), [], None
    mask = torch.ones(2, 4, dtype=torch.long)
    for step in range(20):
        with torch.no_grad():
            output = model(tokens(2, 4, step), attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        widths.append(cache.state.decoder.key_positions[0].shape[1])
        mask = torch.tensor([[1] * 4, [0] * 4])
    assert max(widths) <= 3 * (SEGMENT + 2 * MEMORY_TOKENS)


def test_learned_positions_begin_anew_in_every_segment():
    model = rmt(family("gpt2"))
    with torch.no_grad():
        assert model(tokens(1, 3 * LEARNED_POSITIONS)).logits.isfinite().all()
    fits = LEARNED_POSITIONS - 2 * MEMORY_TOKENS
    rmt(family("gpt2"), segment_length=fits)
    rmt(family("gpt2"), "armt", segment_length=fits + MEMORY_TOKENS)
    for kind, length in (("rmt", fits + 1), ("armt", fits + MEMORY_TOKENS + 1)):
        with pytest.raises(ConfigError, match=f"need {LEARNED_POSITIONS + 1} positions, gpt2 has learned"):
            rmt(family("gpt2"), kind, segment_length=length)


def test_memory_tokens_start_at_the_scale_of_token_embeddings():
    torch.manual_seed(0)
    config = llama_config(initializer_range=0.05)
    model = RMTForCausalLM(RMTConfig(base_config=config, num_memory_tokens=500, segment_length=SEGMENT))
    assert model.memory_tokens.weight.std().item() == pytest.approx(
        model.get_input_embeddings().weight.std().item(), rel=0.03
    )
    scaled = RMTForCausalLM(RMTConfig(base_config=family("gemma3"), num_memory_tokens=500, segment_length=SEGMENT))
    seen = scaled.get_input_embeddings()(torch.arange(50))  # this decoder multiplies its embeddings
    assert scaled.memory_tokens.weight.std().item() == pytest.approx(seen.std().item(), rel=0.03)


@every_kind
def test_memory_parameters_are_counted(kind):
    model = rmt(llama_config(), kind)
    expected = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("memory."))
    assert memory_parameters(model) == expected
    assert expected == model.num_parameters() - model.base.num_parameters()


@every_kind
@pytest.mark.parametrize("freeze_base", [False, True])
def test_a_memory_around_a_loaded_decoder_keeps_its_weights(kind, freeze_base, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = copy.deepcopy(base.state_dict())
    model = RMTForCausalLM.from_base(base, freeze_base=freeze_base, segment_length=SEGMENT, **OPTIONS[kind])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert {tensor.dtype for tensor in model.memory.parameters()} == {torch.bfloat16}
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == ({"memory"} if freeze_base else {"base", "memory"})


@every_kind
def test_bfloat16_models_compute_what_float32_ones_do_up_to_rounding(kind):
    # With the few features of the other tests, what is recalled hangs on the last digits of what is asked.
    options = {"key_dim": 64, "feature_order": 3} if kind == "armt" else {}
    model, ids = rmt(llama_config(), kind, **options).float(), tokens(2, LONG)
    with torch.no_grad():
        exact = model(ids).logits
        half = copy.deepcopy(model).to(torch.bfloat16)(ids, use_cache=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(ids).logits
    for found in (half.logits.float(), cast.float()):
        assert (found - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()
    kept = {tensor.dtype for tensor in memory_of(half.past_key_values.state)}
    assert kept == {torch.bfloat16 if kind == "rmt" else torch.float32}


@every_kind
def test_eager_and_sdpa_attention_agree_on_ragged_rows(kind):
    model, ids = rmt(llama_config(), kind), tokens(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    logits = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert (logits[0] - logits[1]).abs().max() < 2e-5  # the softmax of eager attention is computed in float32


@every_kind
def test_a_copied_model_works_on_its_own(kind):
    model, ids = rmt(llama_config(), kind), tokens(1, LONG)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(ids).logits
        copied.memory_tokens.weight.normal_()
        assert torch.equal(model(ids).logits, before)
        assert not torch.equal(copied(ids).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "matrix"}, "memory must be one of tokens, associative, got 'matrix'"),
        ({"num_memory_tokens": 0}, "num_memory_tokens must be at least 1, got 0"),
        ({"segment_length": 0}, "segment_length must be at least 1, got 0"),
        ({"bptt_segments": 0}, "bptt_segments must be at least 1, got 0"),
        ({"memory": "associative", "key_dim": 0}, "key_dim must be at least 1, got 0"),
        ({"memory": "associative", "feature_order": 0}, "feature_order must be at least 1, got 0"),
        ({"key_dim": 8}, 'key_dim is an option of memory="associative"'),
        ({"feature_order": 2}, 'feature_order is an option of memory="associative"'),
        ({"gate_stretch": 0.1}, 'gate_stretch is an option of memory="associative"'),
        ({"memory": "associative", "gate_stretch": 1.0}, "gate_stretch must be at least 0 and below 1, got 1.0"),
        ({"num_memory_token": 3}, "did you mean num_memory_tokens?"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        RMTConfig(base_config=llama_config(), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("base_config", "message"),
    [
        (T5Config(), "t5 is an encoder-decoder"),
        (Gemma3Config(), "gemma3 reads more than text"),
        (MambaConfig(num_hidden_layers=2, hidden_size=16, vocab_size=30), "Mamba"),
        (mom_config(), "mom has memories in the place of its attention"),
        (RMTConfig(base_config=llama_config()), "rmt has a memory around a decoder already"),
    ],
    ids=["t5", "gemma3", "mamba", "mom", "rmt"],
)
def test_a_decoder_that_cannot_be_run_segment_by_segment_is_refused_with_the_reason(base_config, message):
    with pytest.raises(ConfigError, match=message):
        RMTForCausalLM(RMTConfig(base_config=base_config))


def test_a_model_with_a_memory_is_no_base():
    with pytest.raises(ConfigError, match="has a memory already"):
        RMTForCausalLM.from_base(rmt(llama_config()))


def test_a_foreign_memory_is_never_used():
    states = {kind: rmt(llama_config(), kind).initial_state(1) for kind in OPTIONS}
    ids = tokens(1, 3)
    with pytest.raises(StateError, match="the memory is of another model"):
        rmt(llama_config())(ids, past_key_values=MemoryCache(states["armt"]))
    with pytest.raises(StateError, match="the memory is of another model"):
        rmt(llama_config(), "armt")(ids, past_key_values=MemoryCache(states["rmt"]))
    with pytest.raises(StateError, match="the memory is of another model"):
        rmt(llama_config(), num_memory_tokens=2)(ids, past_key_values=MemoryCache(states["rmt"]))
    with pytest.raises(StateError, match="holds 1 rows, the input has 2"):
        rmt(llama_config())(tokens(2, 3), past_key_values=MemoryCache(states["rmt"]))


def test_bad_inputs_are_refused_by_name():
    model = rmt(llama_config())
    with pytest.raises(ShapeError, match="outside the vocabulary"):
        model(torch.tensor([[99]]))
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@every_kind
def test_a_fact_of_the_first_segment_is_learned_to_be_told_in_the_third(kind):
    options = {"key_dim": 16, "feature_order": 3} if kind == "armt" else {}
    sizes = {"num_memory_tokens": 2, "segment_length": 4, "memory": OPTIONS[kind]["memory"]}
    torch.manual_seed(0)
    decoder = llama_config(num_hidden_layers=2, initializer_range=0.1)
    model = RMTForCausalLM(RMTConfig(base_config=decoder, **sizes, **options))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def texts() -> tuple[Tensor, Tensor]:
        ids, fact = torch.randint(10, 50, (32, 12)), torch.randint(4, 8, (32,))
        ids[:, 1], ids[:, -1] = fact, 3
        return ids, fact

    for _ in range(90):
        ids, fact = texts()
        logits = model(ids, logits_to_keep=1).logits[:, -1]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, fact).backward()
        optimiser.step()
    ids, fact = texts()
    with torch.no_grad():
        told, silenced = (
            model(ids, logits_to_keep=1, knock_out_memory=silence).logits[:, -1].argmax(-1) == fact
            for silence in (False, True)
        )
    assert told.float().mean() > 0.9
    assert silenced.float().mean() < 0.6  # one of four
