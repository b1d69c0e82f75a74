"""A memory on every family of decoders: the graft changes nothing by itself, and every promise holds on each."""

import pytest
import torch
from families import FAMILIES, LEARNED_POSITIONS, VOCABULARY, WINDOW, family
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mnemon.errors import ConfigError, ShapeError
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.graft import attached
from mnemon.models.modeling_lm2 import LM2ForCausalLM

SEGMENT = 7
LONG = 5 * SEGMENT + 3
SPAN = 9
MEMORY = {"num_slots": 5, "slot_dim": 8, "segment_length": SEGMENT}
# Gemma 2's softmax runs in float32 even for float64 models.
TOLERANCE = {"gemma2": 5e-6}
every_family = pytest.mark.parametrize("name", FAMILIES)
every_attention = pytest.mark.parametrize("limits", [{}, {"attention_span": SPAN}], ids=["full", "span and sinks"])


def new_base(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(family(name)).double().eval()


def grafted(name: str, **options) -> LM2ForCausalLM:
    """A graft whose memory has random weights, so that everything it does shows in the logits."""
    model = LM2ForCausalLM.from_base(new_base(name), **MEMORY, **options)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.normal_(std=0.4)
    return model


def tokens(batch: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, width), generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    assert (found - expected).abs().max() <= TOLERANCE.get(name, 1e-11) * expected.abs().max().clamp_min(1)


@every_family
def test_a_fresh_graft_changes_no_bit_within_a_segment_and_nothing_but_rounding_over_many(name):
    base, ids = new_base(name), tokens(2, LONG)
    with torch.no_grad():
        first, whole = base(ids[:, :SEGMENT]).logits, base(ids).logits
        model = LM2ForCausalLM.from_base(base, **MEMORY)
        assert torch.equal(model(ids[:, :SEGMENT]).logits, first)
        assert_close(model(ids).logits, whole, name)
        assert torch.equal(base(ids).logits, whole)  # the decoder itself is untouched


@every_family
@every_attention
@settings(max_examples=4)
@given(data=st.data())
def test_cuts_and_ragged_padding_change_nothing(name, limits, data):
    model, ids = grafted(name, **limits), tokens(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, : data.draw(st.integers(0, 20))] = 0
    cuts = sorted(data.draw(st.sets(st.integers(1, LONG - 1), max_size=4)))
    cache, pieces = None, []
    with torch.no_grad():
        for start, end in zip([0, *cuts], [*cuts, LONG], strict=True):
            output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache, pieces = output.past_key_values, [*pieces, output.logits]
        for row in range(2):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real]).logits[0]
            assert_close(torch.cat(pieces, dim=1)[row][real], alone, name)


@every_family
def test_changing_a_later_token_changes_no_earlier_logit(name):
    model, ids = grafted(name, attention_span=SPAN), tokens(2, LONG)
    other = ids.clone()
    other[:, 20] = (other[:, 20] - 3 + 11) % 47 + 3
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@every_family
def test_cached_generation_equals_uncached_on_ragged_rows(name):
    model, ids = grafted(name, attention_span=SPAN), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@every_family
def test_the_state_of_a_span_limited_model_does_not_grow(name):
    model, sizes, cache = grafted(name, attention_span=SPAN), [], None
    for step in range(LEARNED_POSITIONS // 4):
        with torch.no_grad():
            cache = model(tokens(2, 4, step), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache.state.num_bytes())
    assert len(set(sizes[5:])) == 1


def test_a_sliding_window_of_the_decoder_bounds_the_state_without_any_span():
    model, sizes, cache = grafted("mistral-window"), [], None
    for step in range(12):
        with torch.no_grad():
            cache = model(tokens(1, 4, step), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(cache.state.num_bytes())
    assert len(set(sizes[3:])) == 1
    keys = cache.state.decoder.base[0][0]
    assert keys.shape[2] == WINDOW - 1


def test_a_ragged_batch_with_a_row_that_stands_still_keeps_a_bounded_state():
    model, widths, cache = grafted("llama", attention_span=SPAN), [], None
    mask = torch.ones(2, 4, dtype=torch.long)
    for step in range(20):
        with torch.no_grad():
            output = model(tokens(2, 4, step), attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        widths.append(cache.state.decoder.key_positions[0].shape[1])
        mask = torch.tensor([[1] * 4, [0] * 4])
    assert max(widths) <= 2 * (SPAN - 1 + 4)


@pytest.mark.parametrize(("name", "joins_after_a_norm"), [
    ("llama", False), ("lfm2", False), ("gpt_neox", False), ("gpt2", False), ("olmo2", True), ("gemma2", True),
    ("gemma3", True),
])  # fmt: skip
def test_the_memory_term_reaches_the_residual_stream_unchanged(name, joins_after_a_norm):
    base = new_base(name)
    model = LM2ForCausalLM.from_base(base, **MEMORY)
    index = next(i for i, block in enumerate(model.blocks) if block.attention is not None)
    block = model.blocks[index]
    assert (model.segmented.joins[index].norm is not None) == joins_after_a_norm
    # With the feed-forward silenced, whatever is added to the attention branch is what the block's output differs by.
    with torch.no_grad():
        for child_name, child in block.module.named_children():
            if child is not block.attention and ("mlp" in child_name or "feed_forward" in child_name):
                for parameter in child.parameters():
                    parameter.zero_()
    outputs: list[Tensor] = []

    def note(_: nn.Module, __: tuple, output: Tensor | tuple) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = block.module.register_forward_hook(note)
    ids, term = tokens(1, 5), torch.randn(1, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        base(ids)
        with attached(model.blocks, model.segmented.joins, [index], lambda order, h, x, branch: branch + term):
            base(ids)
    handle.remove()
    assert torch.allclose(outputs[1] - outputs[0], term, atol=1e-12)


def test_what_is_written_leaves_out_the_feed_forward_of_a_parallel_residual():
    model, ids = grafted("gpt_neox", memory_layers=[3]), tokens(1, 5)
    with torch.no_grad():
        before = model(ids, use_cache=True).past_key_values.state.statistics[0]
        for parameter in model.blocks[3].module.mlp.parameters():
            parameter.normal_()
        after = model(ids, use_cache=True).past_key_values.state.statistics[0]
    assert all(torch.equal(one, other) for one, other in zip(before.tensors, after.tensors, strict=True))


def test_a_raw_residual_is_normalised_before_it_queries_the_memory():
    model, ids = grafted("olmo2", memory_layers=[2]), tokens(1, 5)
    seen: list[Tensor] = []
    model.banks[0].read_query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    assert torch.allclose(seen[0].square().mean(-1), torch.ones(1, 5, dtype=torch.float64), atol=1e-4)


ROTARY = [name for name in FAMILIES if name not in ("gpt2", "mistral-window", "gemma2", "gemma3", "lfm2")]


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("sinks", [1, 3])
def test_sinks_stay_visible_at_a_distance_of_at_most_span_and_sinks(name, sinks):
    config = family(name)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).double().eval()
    options = {"memory_layers": [], "segment_length": SEGMENT, "attention_span": SPAN, "attention_sinks": sinks}
    model, ids = LM2ForCausalLM.from_base(base, **options), tokens(1, LONG)
    with torch.no_grad():
        found = model(ids).logits[0]
        for position in range(LONG):
            window = list(range(max(0, position - SPAN + 1), position + 1))
            far = [sink for sink in range(sinks) if sink < window[0]]
            # With one block, keys and values depend on their own token only, so the decoder alone, given the visible
            # tokens at the positions they are meant to have, is the definition.
            nearest = SPAN + sinks - 1
            end = (position // SEGMENT + 1) * SEGMENT - 1
            move = end - nearest if position > nearest else 0
            places = [sink + move for sink in far] + window
            assert position - min(places) <= nearest
            visible = ids[:, far + window]
            mask = torch.zeros(1, 1, len(places), len(places), dtype=torch.bool)
            mask[..., -1, :] = True
            mask |= torch.eye(len(places), dtype=torch.bool)
            expected = base(visible, position_ids=torch.tensor([places]), attention_mask=mask).logits[0, -1]
            assert torch.allclose(found[position], expected, atol=1e-6)


def test_learned_positions_end_with_their_table():
    model = grafted("gpt2", attention_span=SPAN)
    ids = tokens(1, LEARNED_POSITIONS + 1)
    message = f"{LEARNED_POSITIONS + 1} tokens are more than the {LEARNED_POSITIONS} learned positions of gpt2"
    with torch.no_grad():
        model(ids[:, :-1])
        with pytest.raises(ShapeError, match=message):
            model(ids)
    with pytest.raises(ShapeError, match="learned positions"):
        model.generate(ids[:, :-1], max_new_tokens=4, do_sample=False)


class ListOfBlocks(nn.Module):
    """Holds blocks where nobody would look."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        for index, block in enumerate(blocks):
            setattr(self, f"block_{index}", block)


def test_blocks_that_cannot_be_found_are_asked_for_by_hand():
    base = new_base("llama")
    hidden = ListOfBlocks(base.model.layers)
    base.model.layers = nn.ModuleList([*base.model.layers, nn.Identity()])
    with pytest.raises(ConfigError, match=r"looked for one nn.ModuleList of num_hidden_layers=4 .* blocks_path="):
        LM2ForCausalLM(LM2Config(base_config=base.config), base)
    del hidden


def test_blocks_and_attention_can_be_named_by_hand():
    base, ids = new_base("llama"), tokens(1, LONG)
    options = {"blocks_path": "model.layers", "attention_name": "self_attn"}
    with torch.no_grad():
        assert torch.equal(LM2ForCausalLM.from_base(base, **MEMORY, **options)(ids).logits,
                           LM2ForCausalLM.from_base(base, **MEMORY)(ids).logits)  # fmt: skip
    with pytest.raises(ConfigError, match=r"blocks_path='model.nothing' .* is no list of modules; expected its 4"):
        LM2ForCausalLM.from_base(base, blocks_path="model.nothing")
    with pytest.raises(ConfigError, match="attention_name='attn' is not in LlamaDecoderLayer"):
        LM2ForCausalLM.from_base(base, attention_name="attn")


def test_a_decoder_with_a_state_nobody_knows_of_is_refused():
    base = new_base("llama")

    def mix_all_tokens(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        return output + output.cumsum(dim=1)

    base.model.layers[1].register_forward_hook(mix_all_tokens)
    with pytest.raises(ConfigError, match="gives other logits when a text is read in pieces"):
        LM2ForCausalLM.from_base(base)


def test_keys_that_no_rotation_explains_are_refused_for_sinks_only():
    base = new_base("llama")
    base.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda _, args, output: output * (1 + args[0].shape[1])  # the cached key depends on more than its own token
    )
    base.model.rotary_emb.register_forward_hook(lambda _, args, output: (output[0] ** 2, output[1]))
    model = LM2ForCausalLM(LM2Config(base_config=base.config, attention_span=SPAN, attention_sinks=2, **MEMORY), base)
    with pytest.raises(ConfigError, match=r"cannot be moved to another position.*attention_sinks=0"), torch.no_grad():
        model(tokens(1, 5))
