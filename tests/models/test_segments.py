"""Calls of the decoder: how ragged rows are cut, and that a call over several segments equals a call for each."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm2_cases import EXTENSIONS, SEGMENT, case, lfm2_config, llama_config, lm2, tokens

from mnemon.models.modeling_lm2 import LM2ForCausalLM, LM2Output
from mnemon.models.segments import count_calls, plan_calls


@st.composite
def inputs(draw: st.DrawFn) -> tuple[np.ndarray | None, int, list[int], int, int]:
    """Draw a mask [B, width], the width, tokens read before, a segment length, and segments per call."""
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    counts = draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows))
    mask = draw(
        st.none() | st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)
    )
    return None if mask is None else np.array(mask), width, counts, draw(st.integers(1, 7)), draw(st.integers(1, 4))


@given(inputs())
def test_every_real_token_is_in_one_call_and_the_calls_are_as_many_as_counted(drawn):
    mask, width, counts, length, at_once = drawn
    calls = list(plan_calls(mask, width, counts, length, at_once))
    assert len(calls) == count_calls(mask, width, counts, length, at_once)
    for row, count in enumerate(counts):
        found = np.concatenate([[], *(call.columns[row, : call.lengths[row]] for call in calls)])
        assert found.tolist() == (list(range(width)) if mask is None else np.flatnonzero(mask[row]).tolist())
        for call in calls:
            assert call.starts[row] == count
            count += call.lengths[row]
            assert call.completes[row] == (call.lengths[row] > 0 and count % length == 0)
    assert all(call.width <= at_once * length for call in calls)


@given(inputs())
def test_the_segments_of_a_call_are_the_calls_of_one_segment_each(drawn):
    mask, width, counts, length, at_once = drawn
    wide = [part for call in plan_calls(mask, width, counts, length, at_once) for part in call.segments(length)]
    narrow = list(plan_calls(mask, width, counts, length))
    assert len(wide) == len(narrow)
    for one, other in zip(wide, narrow, strict=True):
        for name in ("columns", "lengths", "starts", "completes"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


@contextmanager
def counted_calls(model: LM2ForCausalLM) -> Iterator[list[int]]:
    """Note the width of every call of the decoder."""
    widths: list[int] = []

    def note(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        widths.append(kwargs["input_ids"].shape[1])

    handle = model.base.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()


OWN_BANKS = {
    "llama-layer-full": lambda: case("llama-layer-full"),
    "lfm2-layer-span": lambda: case("lfm2-layer-span"),
    "one bank": lambda: lm2(llama_config(), memory_layers=[1], attention_span=9),
    "one bank, extended": lambda: lm2(lfm2_config(), memory_layers=[1], attention_span=9, **EXTENSIONS),
    "no bank": lambda: lm2(llama_config(), memory_layers=[], attention_span=9),
}
LONG = 6 * SEGMENT + 4


def ragged(rows: int, width: int) -> torch.Tensor:
    mask = torch.ones(rows, width, dtype=torch.long)
    mask[1, :9] = 0
    mask[2, 16:] = 0
    return mask


def results(
    model: LM2ForCausalLM, mask: torch.Tensor | None, training: bool, **options: bool
) -> tuple[LM2Output, dict[str, torch.Tensor]]:
    """Read a text in two calls, and return the second output and the gradients of everything."""
    model.train(training).zero_grad()
    ids = tokens(3, LONG)
    cut = SEGMENT + 3
    first = model(ids[:, :cut], attention_mask=None if mask is None else mask[:, :cut], use_cache=True)
    output = model(
        ids[:, cut:], attention_mask=mask, past_key_values=first.past_key_values, output_diagnostics=True, **options
    )
    real = torch.ones_like(ids) if mask is None else mask
    weights = torch.randn(3, LONG, 1, generator=torch.Generator().manual_seed(1)) * real[..., None]
    loss = (first.logits * weights[:, :cut]).sum() + (output.logits * weights[:, cut:]).sum()
    loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    assert torch.allclose(found, expected, rtol=0, atol=1e-9 * scale), name


@pytest.mark.parametrize("segments", [2, 3, 20])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("name", OWN_BANKS)
def test_a_call_over_several_segments_equals_a_call_for_each(name, padded, segments, monkeypatch):
    model, mask = OWN_BANKS[name](), ragged(3, LONG) if padded else None
    real = slice(None) if mask is None else mask[:, SEGMENT + 3 :].bool()
    options = {"output_write_rate": True} if model.config.skip_gate else {}
    for training in (False, True):
        monkeypatch.setattr("mnemon.models.modeling_lm2._CALL_LENGTH", SEGMENT)
        expected, gradients = results(model, mask, training, **options)
        monkeypatch.setattr("mnemon.models.modeling_lm2._CALL_LENGTH", segments * SEGMENT + 2)
        assert model.call_length == segments * SEGMENT
        with counted_calls(model) as calls:
            found, own_gradients = results(model, mask, training, **options)
        assert max(calls) > SEGMENT  # the texts were indeed read several segments at a time
        assert_equal("logits", found.logits[real], expected.logits[real])
        state, other = found.past_key_values.state, expected.past_key_values.state
        assert state.counts == other.counts
        assert_equal("bank", state.bank, other.bank)
        assert_equal("kept", state.kept, other.kept)
        for own, their in zip(state.statistics, other.statistics, strict=True):
            for one, two in zip(own.tensors, their.tensors, strict=True):
                assert_equal("statistics", one, two)
        assert own_gradients.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert_equal(parameter, own_gradients[parameter], gradient)
        assert found.diagnostics.keys() == expected.diagnostics.keys()
        for measure, value in expected.diagnostics.items():
            assert_equal(measure, found.diagnostics[measure], value)
        if options:
            assert_equal("write rate", found.write_rate, expected.write_rate)


def test_recomputing_several_segments_gives_the_same_gradients():
    model = OWN_BANKS["one bank, extended"]()
    _, expected = results(model, None, training=True)
    model.gradient_checkpointing_enable()
    _, found = results(model, None, training=True)
    for parameter, gradient in expected.items():
        assert_equal(parameter, found[parameter], gradient)


@pytest.mark.parametrize(
    "options",
    [
        {"flow": "depth"},
        {"flow": "layer", "attention_span": 9, "attention_sinks": 2},
        {"flow": "layer", "segment_length": 600},
    ],
    ids=["one bank for all blocks", "sinks", "long segments"],
)
def test_a_call_ends_with_the_segment_where_a_block_needs_what_a_later_one_wrote(options):
    model = lm2(llama_config(), **options)
    assert model.call_length == model.config.segment_length
