"""Long inputs: what is kept of a segment, what the backward pass recomputes, where the gradient ends."""

import weakref

import pytest
import torch
from families import family
from lm2_cases import SEGMENT, lfm2_config, llama_config, lm2, tokens
from torch import Tensor, nn

LONG = 6 * SEGMENT + 2
BASES = {"llama": llama_config(), "lfm2": lfm2_config(), "gemma3": family("gemma3"), "gpt2": family("gpt2")}
LIMITS = {"full": {}, "span": {"attention_span": 9}, "sinks": {"attention_span": 9, "attention_sinks": 2}}


def peak_of_living_outputs(width: int, **options) -> int:
    """Run a text and return the largest number of block outputs alive at any time."""
    model = lm2(llama_config(), attention_span=9)
    alive: set[int] = set()
    peak = 0

    def note(_: nn.Module, __: tuple, output: Tensor) -> None:
        nonlocal peak
        key = id(output)
        alive.add(key)
        weakref.finalize(output, alive.discard, key)
        peak = max(peak, len(alive))

    for block in model.blocks:
        block.module.register_forward_hook(note)
    with torch.no_grad():
        model(tokens(1, width), **options)
    return peak


def test_no_activation_outlives_its_segment_however_long_the_input():
    assert peak_of_living_outputs(50 * SEGMENT, logits_to_keep=1) == peak_of_living_outputs(SEGMENT, logits_to_keep=1)


@pytest.mark.parametrize("keep", [1, 5, SEGMENT + 1, torch.tensor([0, 3, LONG - 1]), torch.tensor([5, 5, 2])])
def test_the_logits_kept_are_those_of_the_columns_asked_for(keep):
    model, ids = lm2(llama_config(), attention_span=9), tokens(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        some = model(ids, attention_mask=mask, logits_to_keep=keep).logits
    wanted = torch.arange(LONG)[-keep:] if isinstance(keep, int) else keep
    for row in range(2):
        real = mask[row, wanted].bool()
        assert torch.allclose(some[row][real], whole[row, wanted][real], atol=1e-12)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("base", BASES)
def test_recomputing_segments_gives_exactly_the_gradients_of_keeping_them(base, limits):
    ids = tokens(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    labels = ids.masked_fill(mask == 0, -100)
    gradients = []
    for checkpointed in (False, True):
        model = lm2(BASES[base], **LIMITS[limits]).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-9, atol=1e-12), name


def test_masks_are_numbers_only_where_a_backward_pass_follows(monkeypatch):
    kinds: list[torch.dtype | None] = []
    attend = nn.functional.scaled_dot_product_attention

    def watched(*args: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        if "is_causal" in options:  # the decoder's attention; the bank is read without
            kinds.append(None if attn_mask is None else attn_mask.dtype)
        return attend(*args, attn_mask=attn_mask, **options)

    model, ids = lm2(llama_config()), tokens(1, 2 * SEGMENT)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        expected = model(ids).logits
    assert set(kinds) == {None, torch.bool}
    kinds.clear()
    assert torch.allclose(model.train()(ids).logits, expected, atol=1e-13)
    assert set(kinds) == {None, torch.float64}


def test_checkpointing_runs_every_segment_twice_and_only_in_training():
    model, ids = lm2(llama_config()), tokens(1, 4 * SEGMENT)
    model.gradient_checkpointing_enable()
    runs: list[int] = []
    model.blocks[0].module.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model(ids)
    model.segmented.prepare()
    runs.clear()
    model.train()(ids, labels=ids).loss.backward()
    assert len(runs) == 2 * 4
    runs.clear()
    model.gradient_checkpointing_disable()
    model(ids, labels=ids).loss.backward()
    assert len(runs) == 4


@pytest.mark.parametrize("checkpointed", [False, True])
def test_only_a_checkpointed_forward_pass_lets_activations_go(checkpointed):
    model, ids = lm2(llama_config()).train(), tokens(1, 4 * SEGMENT)
    if checkpointed:
        model.gradient_checkpointing_enable()
    model(ids[:, :2])
    alive: set[int] = set()

    def note(_: nn.Module, __: tuple, output: Tensor) -> None:
        alive.add(id(output))
        weakref.finalize(output, alive.discard, id(output))

    for block in model.blocks:
        block.module.mlp.up_proj.register_forward_hook(note)
    loss = model(ids, labels=ids).loss
    assert len(alive) == (0 if checkpointed else 4 * len(model.blocks))
    loss.backward()


def joined_keys_kept(width: int) -> int:
    """Count the elements of keys and values of the first block that autograd keeps, each storage once."""
    model, ids = lm2(llama_config()).train(), tokens(1, width)
    model(ids[:, :2])
    alive: dict[int, int] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        for tensor in kwargs["past_key_values"].states[0].seen:
            storage = tensor.untyped_storage()
            alive[id(storage)] = storage.nbytes()
            weakref.finalize(storage, alive.pop, id(storage), None)

    model.blocks[0].attention.register_forward_hook(note, with_kwargs=True)
    loss = model(ids, labels=ids).loss
    kept = sum(alive.values())
    loss.backward()
    return kept


def test_keys_kept_for_the_backward_pass_grow_with_the_length_and_not_with_its_square():
    short, long = joined_keys_kept(4 * SEGMENT), joined_keys_kept(16 * SEGMENT)
    assert long <= 4.5 * max(short, 1)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_truncation_cuts_the_gradient_at_the_segment_it_names(checkpointed, depth):
    ids = tokens(1, 4 * SEGMENT)
    model = lm2(llama_config(), bptt_segments=depth).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[:, -1].sum().backward()
    reached = embedded.grad.abs().amax(dim=(0, 2)) > 0
    first = (4 - depth) * SEGMENT
    assert not reached[:first].any()
    assert reached[first:].any()


def test_a_memory_state_cannot_be_reentrant():
    with pytest.raises(ValueError, match="use_reentrant=True"):
        lm2(llama_config()).gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
@pytest.mark.parametrize("base", BASES)
def test_compiling_the_feed_forward_changes_no_gradient(base):
    ids, gradients = tokens(2, LONG), []
    for compiled in (False, True):
        model = lm2(BASES[base], attention_span=9).train()
        if compiled:
            model.compile_for_training(backend="eager")  # the tracing is what may go wrong, not the code generator
            assert any(module._compiled_call_impl is not None for module in model.base.modules())
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, atol=1e-10), name
