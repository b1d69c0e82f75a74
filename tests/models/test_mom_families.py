"""Memories in the place of the attention of every family of decoders: what is replaced, and that it still holds."""

import itertools

import pytest
import torch
from families import FAMILIES, LEARNED_POSITIONS, WINDOW, family
from lm2_cases import tokens
from mom_cases import mom, mom_config
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
    GPTNeoXJapaneseConfig,
    JetMoeConfig,
    MambaConfig,
    OpenAIGPTConfig,
    T5Config,
    TrOCRConfig,
)

from mnemon.errors import ConfigError, ShapeError
from mnemon.layers.linear_memory import LinearMemory
from mnemon.layers.mixture_of_memories import MixtureOfMemories
from mnemon.models.graft import num_values_taken
from mnemon.models.memory_mixer import MemoryMixer
from mnemon.models.modeling_mom import MoMForCausalLM

LONG = 31
SLIDING = 6
# Gemma 2's softmax runs in float32 even for float64 models, and norms of most others do.
TOLERANCE = 5e-6
SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "initializer_range": 0.2,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
HYBRID = ["mom", "sliding_attention", "memory", "full_attention"]
every_family = pytest.mark.parametrize("name", FAMILIES)
every_mix = pytest.mark.parametrize("mix", ["memories", "hybrid"])


def build(name: str, mix: str) -> MoMForCausalLM:
    if mix == "memories" or name == "lfm2":  # blocks 0 and 2 of LFM2 are convolutions, which stay
        return mom(family(name))
    return mom(family(name), layer_types=HYBRID, sliding_window=SLIDING)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1)


@every_family
def test_the_attention_and_its_weights_are_gone_and_nothing_else_is(name):
    plain, model = AutoModelForCausalLM.from_config(family(name)), build(name, "memories")
    attentions = [block.attention for block in model.blocks if block.kind == "memory"]
    assert len(attentions) == (2 if name == "lfm2" else 4)
    assert all(isinstance(attention, MemoryMixer) for attention in attentions)
    mixers = tuple(f"{path}." for path, module in model.base.named_modules() if isinstance(module, MemoryMixer))
    kept = {key: value.shape for key, value in model.base.state_dict().items() if not key.startswith(mixers)}
    expected = {key: value.shape for key, value in plain.state_dict().items() if not key.startswith(mixers)}
    assert kept == expected
    assert len(expected) < len(plain.state_dict())


@every_family
@every_mix
def test_cuts_and_ragged_padding_change_nothing(name, mix):
    model, ids = build(name, mix), tokens(3, LONG)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    mask[2, [3, 4, 9, 30]] = 0
    cache, pieces = None, []
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 21), (21, LONG)):
            output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache, pieces = output.past_key_values, [*pieces, output.logits]
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real]).logits[0]
            assert_close(torch.cat(pieces, dim=1)[row][real], alone)
            assert_close(whole[row][real], alone)


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXJapaneseConfig(**SMALL, num_attention_heads=4),
        JetMoeConfig(**SMALL, num_key_value_heads=2, kv_channels=8, num_local_experts=2, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("types", [None, HYBRID])
def test_blocks_that_take_three_values_from_their_attention_get_them(config, types):
    model = mom(config) if types is None else mom(config, layer_types=types, sliding_window=SLIDING)
    ids = tokens(2, LONG)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :20], use_cache=True)
        second = model(ids[:, 20:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], dim=1), whole)


def test_a_block_whose_source_cannot_be_read_is_taken_to_want_two_values():
    block = torch.nn.Sequential(torch.nn.Identity())
    namespace: dict = {}
    exec("def forward(self, x):\n    a, b, c = self.attention(x)\n    return a", namespace)
    unread = type("Unread", (torch.nn.Module,), {"forward": namespace["forward"]})()
    assert [num_values_taken(block, "0"), num_values_taken(unread, "attention")] == [2, 2]


@every_family
@every_mix
def test_changing_a_later_token_changes_no_earlier_logit(name, mix):
    model, ids = build(name, mix), tokens(2, LONG)
    other = ids.clone()
    other[:, 20] = (other[:, 20] - 3 + 11) % 47 + 3
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    assert_close(before[:, :20], after[:, :20])
    assert (before - after)[:, 20:].abs().amax(dim=-1).min() > 1e-5


@every_family
def test_cached_generation_equals_uncached_on_ragged_rows(name):
    model, ids = build(name, "hybrid"), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "lfm2"])
def test_blocks_that_keep_their_attention_are_those_of_the_plain_decoder(name):
    """With the window of the decoder's own, or none, a model without memories is the decoder."""
    config = family(name)
    native = getattr(config, "layer_types", None) or ["full_attention"] * 4
    window = getattr(config, "sliding_window", None)
    if name == "mistral-window":
        native = ["sliding_attention"] * 4
    options = {"sliding_window": window} if "sliding_attention" in native else {}
    model = mom(config, layer_types=list(native), **options)
    plain = AutoModelForCausalLM.from_config(family(name)).double().eval()
    plain.load_state_dict(model.base.state_dict())
    ids = tokens(2, LONG)
    with torch.no_grad():
        assert_close(model(ids).logits, plain(ids).logits)


def attended(model: MoMForCausalLM, block: int, position: int) -> list[int]:
    """Tokens whose change shows in what a block's attention answers at a position."""
    answers = []
    model.blocks[block].attention.register_forward_hook(lambda _, __, output: answers.append(output[0]))
    ids = tokens(1, LONG)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded)
    (slope,) = torch.autograd.grad(answers[-1][0, position].sum(), embedded)
    return (slope[0].abs().amax(dim=-1) > 0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("gemma2", "eager"),
        *itertools.product(["llama", "mistral-window", "gpt2", "gpt_neox", "smollm3"], ["sdpa", "eager"]),
    ],
)
def test_a_block_attends_to_what_its_layer_type_says_whatever_the_decoder_had(name, implementation):
    for layer_type, first in (("sliding_attention", 20 - SLIDING + 1), ("full_attention", 0)):
        types = [layer_type, "mom", "mom", "mom"]
        window = {"sliding_window": SLIDING} if layer_type == "sliding_attention" else {}
        model = mom(family(name), layer_types=types, **window)
        model.set_attn_implementation(implementation)
        assert attended(model, 0, 20) == list(range(first, 21))
    assert WINDOW != SLIDING


@pytest.mark.parametrize("mix", ["memories", "hybrid"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_eager_and_sdpa_attention_agree_on_ragged_rows(name, mix):
    model, ids = build(name, mix), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    logits = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert (logits[0] - logits[1]).abs().max() < (2e-5 if mix == "hybrid" else 1e-12)


def test_convolution_blocks_stay_and_their_attention_alone_is_replaced():
    model = mom(family("lfm2"))
    assert [block.kind for block in model.blocks] == ["conv", "memory"] * 2
    message = r"layer_types\[0\] is mom, but block 0 of Lfm2ForCausalLM has no attention; blocks with one: \[1, 3\]"
    with pytest.raises(ConfigError, match=message):
        mom(family("lfm2"), layer_types=["mom"] * 4)


def test_learned_positions_end_with_their_table_also_where_nothing_attends():
    model, ids = mom(family("gpt2")), tokens(1, LEARNED_POSITIONS + 1)
    with torch.no_grad(), pytest.raises(ShapeError, match=f"{LEARNED_POSITIONS} learned positions of gpt2"):
        model(ids)


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
    ],
    ids=["encoder-decoder", "multi-modal", "alibi", "own positions", "no cache", "mamba"],
)
def test_a_decoder_whose_attention_cannot_be_replaced_is_refused_with_the_reason(base_config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        MoMForCausalLM(mom_config(base_config))
    assert "\n" not in str(caught.value)


def test_blocks_and_attention_can_be_named_by_hand():
    found, named = mom(), mom(blocks_path="model.layers", attention_name="self_attn")
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, named(ids).logits)
    with pytest.raises(ConfigError, match="attention_name='attn' is not in LlamaDecoderLayer"):
        mom(attention_name="attn")


def test_a_forward_that_others_put_on_a_block_stays_there():
    """Libraries that place blocks on devices wrap their forward."""
    model, ids = mom(layer_types=["mom", "full_attention", "memory"]), tokens(1, 9)
    with torch.no_grad():
        expected = model(ids).logits
    block, calls = model.blocks[1].module, []
    original = block.forward
    block.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(ids).logits, expected)
    assert len(calls) == 2


def test_no_hook_and_no_wrapper_outlives_a_call():
    model = mom(layer_types=["mom", "full_attention", "memory"])
    model.train().gradient_checkpointing_enable()
    ids = tokens(1, 9)
    model(ids, labels=ids).loss.backward()
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_memory_layers_are_listed_in_block_order():
    model = mom(layer_types=["memory", "full_attention", "mom"])
    assert [type(layer) for layer in model.memory_layers] == [LinearMemory, MixtureOfMemories]
