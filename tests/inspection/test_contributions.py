"""Contributions: the split over tokens is the definition's, adds up to the answer, and knows no cuts."""

from typing import Any

import numpy as np
import pytest
import torch
from layer_cases import CASES, D, H, K, random
from torch import Tensor

from mnemon.inspection.contributions import LayerCall, LayerContributions, joined
from mnemon.layers.linear_memory import LinearMemory
from mnemon.layers.memory_layer import MemoryLayer
from mnemon.layers.mixture_of_memories import MixtureOfMemories
from mnemon.ops import get_rule
from mnemon.ops.state import leaves, rebuild

T, LAST = 23, 22
READERS = [9, LAST]
LINEAR = [
    case
    for case in CASES
    if get_rule(case.values[0]["rule"]).linear_in_values(**{k: v for k, v in case.values[0].items() if k != "rule"})
]
MINI_BATCHES = pytest.param({"rule": "titans", "mini_batch_size": 4}, id="titans-mini-batches")
every_linear_rule = pytest.mark.parametrize("options", [*LINEAR, MINI_BATCHES])
KINDS = {
    "single": lambda options: single(options),
    "mixture": lambda options: mixture(options),
    "one projection, capacity": lambda options: mixture(
        options, single_kv_proj=True, capacity=0.4, shared_memory=False, conv_size=0
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def single(options: dict[str, Any], **more: Any) -> MemoryLayer:
    torch.manual_seed(1)
    sizes = {"hidden_size": D, "num_heads": H, "head_dim": K, "layer_index": 1, "num_layers": 2}
    return LinearMemory(**{**sizes, **options, **more}).double()


def mixture(options: dict[str, Any], **more: Any) -> MemoryLayer:
    torch.manual_seed(1)
    sizes = {"hidden_size": D, "num_heads": H, "head_dim": K, "num_memories": 3, "layer_index": 1, "num_layers": 2}
    return MixtureOfMemories(**{**sizes, **options, **more}).double()


@torch.no_grad()
def calls(layer: MemoryLayer, lengths: list[int], before: int = 11) -> list[LayerCall]:
    """Read tokens in calls of these lengths, from the state after some others."""
    state = layer(random(1, before, D, seed=5))[1] if before else None
    found = []
    for x in random(1, T, D, seed=6).split(lengths, dim=1):
        output = layer(x, None, state)
        found.append(LayerCall.of(layer, (x, None, state), output))
        state = output[1]
    return found


@torch.no_grad()
def split(layer: MemoryLayer, found: list[LayerCall], readers: list[int] | None = None) -> dict:
    """Return (shares, before) of every token as a column of its own, by (reader, memory)."""
    contributions = LayerContributions(layer, readers or READERS, np.arange(T))
    first = T
    for call in reversed(found):
        first -= call.x.shape[1]
        contributions.go_back(call, first)
    return {(c.reader, c.memory): (c.shares.astype(np.float64), c.before) for c in contributions.results()}


@torch.no_grad()
def by_definition(layer: MemoryLayer, call: LayerCall, reader: int, memory: int) -> tuple[np.ndarray, float]:
    """Return the shares and the part before the text by running the recurrence once for every value."""
    contributions = LayerContributions(layer, [reader], np.arange(T))
    own = call.taken[:, memory].nonzero()[:, 0]
    inputs = contributions._rule_inputs(memory, call, own)
    state = call.before.memories.map(lambda x: x[:, memory]) if isinstance(layer, MixtureOfMemories) else call.before
    place = own.tolist().index(reader)

    def answer(values: Tensor, keeps_state: bool) -> Tensor:
        tensors = [
            tensor if keeps_state or number not in contributions.tensors else torch.zeros_like(tensor)
            for number, tensor in enumerate(leaves(state.memory))
        ]
        start = rebuild(state.memory, tensors)
        output, _ = layer.rule.recurrent(inputs.q, inputs.k, values, state=start, **inputs.keywords)
        return output[0, place].flatten()

    whole = answer(inputs.v, True)
    shares = np.zeros(T)
    for column, token in enumerate(own.tolist()):
        alone = torch.zeros_like(inputs.v)
        alone[:, column] = inputs.v[:, column]
        shares[token] = float(answer(alone, False) @ whole / (whole @ whole))
    return shares, float(answer(torch.zeros_like(inputs.v), True) @ whole / (whole @ whole))


@every_kind
@every_linear_rule
def test_every_share_is_what_the_rule_answers_if_only_that_value_is_not_zero(options: dict, kind: str) -> None:
    layer = KINDS[kind](options)
    (call,) = calls(layer, [T])
    found = split(layer, [call])
    assert {reader for reader, _ in found} <= set(READERS)
    assert len(found) >= (1 if "capacity" in kind else 2)
    for (reader, memory), (shares, before) in found.items():
        expected, expected_before = by_definition(layer, call, reader, memory)
        np.testing.assert_allclose(shares, expected, rtol=0, atol=1e-6)  # kept in float32
        assert before == pytest.approx(expected_before, abs=1e-9)
        assert not shares[reader + 1 :].any()
        assert not shares[~call.taken[:, memory].numpy()].any()


@every_kind
@every_linear_rule
def test_the_shares_and_the_part_before_the_text_add_up_to_one(
    options: dict, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "float32", np.float64)  # what is kept would hide what is computed
    layer = KINDS[kind](options)
    for before in (0, 11):
        found = split(layer, calls(layer, [5, 1, 17], before))
        assert found
        for shares, at_start in found.values():
            assert shares.sum() + at_start == pytest.approx(1.0, abs=1e-9)
            assert (at_start != 0) == (before > 0)


@every_kind
@every_linear_rule
def test_going_back_in_pieces_changes_nothing(options: dict, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "float32", np.float64)
    layer = KINDS[kind](options)
    whole = split(layer, calls(layer, [T]))
    for pieces in (calls(layer, [9, 1, 4, 9]), [joined(calls(layer, [5, 18]))]):
        found = split(layer, pieces)
        assert found.keys() == whole.keys()
        for key, (shares, before) in found.items():
            np.testing.assert_allclose(shares, whole[key][0], rtol=0, atol=1e-10)
            assert before == pytest.approx(whole[key][1], abs=1e-10)


def test_columns_hold_the_sums_of_their_tokens() -> None:
    layer = mixture({"rule": "gated_delta_net"})
    (call,) = calls(layer, [T])
    columns = np.arange(T) // 4
    contributions = LayerContributions(layer, [LAST], columns)
    contributions.go_back(call, 0)
    tokens = split(layer, [call], [LAST])
    for contribution in contributions.results():
        expected = np.bincount(columns, tokens[LAST, contribution.memory][0])
        np.testing.assert_allclose(contribution.shares, expected, atol=1e-6)


def test_an_answer_of_zero_has_no_parts() -> None:
    layer = single({"rule": "linear_attention"})
    with torch.no_grad():
        layer.v_proj.weight.zero_()
    assert not split(layer, calls(layer, [T], before=0))


def test_half_precision_is_split_in_float32() -> None:
    layer = mixture({"rule": "mamba2"}).bfloat16()
    with torch.no_grad():
        x = random(1, T, D, seed=6).bfloat16()
        found = split(layer, [LayerCall.of(layer, (x,), layer(x))])
    assert found
    for shares, before in found.values():
        assert shares.sum() + before == pytest.approx(1.0, abs=1e-5)
