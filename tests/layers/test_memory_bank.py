"""The bank against its equations: the online write is the softmax, gates and initial bank are what they should be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mnemon.layers.memory_bank import MemoryBank, SegmentRead, initial_bank, rms_normalise

B, D, J, W, H = 2, 20, 5, 12, 3


def opened(layer: MemoryBank, bank: torch.Tensor) -> SegmentRead:
    return layer.open_segment(rms_normalise(bank))


def bank_layer(**options) -> MemoryBank:
    torch.manual_seed(1)
    layer = MemoryBank(D, J, W, H, **({"retention": 0.73} | options))
    with torch.no_grad():
        for parameter, value in layer.initial_values():
            parameter.copy_(value)
        for gate in (layer.output_gate, layer.input_gate, layer.forget_gate, layer.forget_gate_bank, layer.skip_gate):
            if gate is not None:
                gate.weight.normal_()
        if layer.write_conv is not None:
            layer.write_conv.weight.normal_()
    return layer.double()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every token and those before it [T, W], times the columns of the weight [W, size], the last for the token."""
    size = weight.shape[1]
    return torch.stack(
        [sum(weight[:, size - 1 - back] * x[t - back] for back in range(min(size, t + 1))) for t in range(len(x))]
    )


VARIANTS = [{}, {"coupled_gates": True}, {"write_query": "bank"}, {"write_query": "key"}, {"write_conv": 3}]


def direct_update(layer: MemoryBank, bank: torch.Tensor, residual: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The write, one row, one head and one slot at a time, straight from the equations."""
    d = W // H
    new = bank.clone()
    for row in range(B):
        y = residual[row] * torch.rsqrt(residual[row].square().mean(-1, keepdim=True) + layer.norm_eps)
        y = y * layer.write_norm
        hat = rms_normalise(bank[row])
        query = torch.zeros(J, W, dtype=torch.float64)
        if layer.write_query is not None:
            query = query + hat @ layer.write_query.weight.T
        if layer.has_slot_key:
            query = query + layer.slot_key
        key, value = y @ layer.write_key.weight.T, y @ layer.write_value.weight.T
        if layer.write_conv is not None:
            taps = layer.write_conv.weight.split(W)
            key, value = (convolved(x, weight) for x, weight in zip((key, value), taps, strict=True))
        written = torch.zeros(J, W, dtype=torch.float64)
        for head in range(H):
            part = slice(head * d, (head + 1) * d)
            for slot in range(J):
                score = key[:, part] @ query[slot, part] / math.sqrt(d)
                age = torch.arange(len(score) - 1, -1, -1, dtype=torch.float64)
                score = score - layer.recency_slope[head] * age
                weight = score.masked_fill(~mask[row], float("-inf")).softmax(0)
                written[slot, part] = weight @ value[:, part]
        gate_forget = torch.sigmoid(layer.forget_gate(written) + layer.forget_gate_bank(hat))
        gate_in = 1 - gate_forget if layer.input_gate is None else torch.sigmoid(layer.input_gate(written))
        new[row] = gate_in * torch.tanh(written) + gate_forget * bank[row]
    return new


def gathered(layer: MemoryBank, bank: torch.Tensor, residual: torch.Tensor, cuts: list[int], valid=None):
    statistics = layer.empty_statistics(B, residual)
    segment = opened(layer, bank)
    width = residual.shape[1]
    for start, end in zip([0, *cuts], [*cuts, width], strict=True):
        positions = torch.arange(start, end)[None]
        part = None if valid is None else valid[:, start:end]
        statistics = layer.gather(residual[:, start:end], positions, part, segment, statistics)
    return statistics


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@given(width=st.integers(1, 33), cuts=st.sets(st.integers(1, 32), max_size=4))
def test_the_online_write_equals_the_equations_at_any_cut(options, width, cuts):
    layer, bank, residual = bank_layer(**options), random(B, J, W), random(B, width, D, seed=2)
    everything = torch.ones(B, width, dtype=torch.bool)
    statistics = gathered(layer, bank, residual, sorted(cut for cut in cuts if cut < width))
    updated, _ = layer.update(bank, statistics)
    assert torch.allclose(updated, direct_update(layer, bank, residual, everything), atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_write_shares_are_what_every_token_contributes_to_the_content(options):
    layer, bank, residual, cut = bank_layer(**options), random(B, J, W), random(B, 9, D, seed=1), 4
    statistics, nothing = gathered(layer, bank, residual, [cut]), layer.empty_statistics(B, residual)
    past = gathered(layer, bank, residual[:, :cut], [])
    pieces = (
        (residual[:, :cut], torch.arange(cut)[None], nothing),
        (residual[:, cut:], torch.arange(cut, 9)[None], past),
    )
    shares = torch.cat(
        [layer.write_shares(piece, place, opened(layer, bank), before, statistics) for piece, place, before in pieces],
        dim=-1,
    )
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(B, H, J, dtype=torch.float64), rtol=0, atol=1e-12)
    y = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + layer.norm_eps) * layer.write_norm
    values = y @ layer.write_value.weight.T
    if layer.write_conv is not None:
        values = torch.stack([convolved(row, layer.write_conv.weight[W:]) for row in values])
    values = values.view(B, 9, H, W // H).transpose(1, 2)
    content = statistics.value / statistics.total[..., None]
    torch.testing.assert_close(shares @ values, content, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_masked_tokens_take_no_part_in_the_write(options):
    layer, bank, residual = bank_layer(**options), random(B, J, W), random(B, 11, D, seed=2)
    valid = torch.ones(B, 11, dtype=torch.bool)
    valid[:, 8:] = False
    with_blanks, _ = layer.update(bank, gathered(layer, bank, residual, [4, 9], valid))
    without, _ = layer.update(bank, gathered(layer, bank, residual[:, :8], [4]))
    assert torch.allclose(with_blanks, without, atol=1e-14)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_call_without_a_real_token_leaves_the_write_statistics_exactly_as_they_were(options):
    layer, bank = bank_layer(**options), random(B, J, W)
    segment, nothing = opened(layer, bank), torch.zeros(B, 3, dtype=torch.bool)
    fresh = layer.empty_statistics(B, bank)
    begun = layer.gather(random(B, 4, D, seed=2), torch.arange(4)[None], None, segment, fresh)
    for before in (fresh, begun):
        after = layer.gather(random(B, 3, D, seed=3), torch.arange(4, 7)[None], nothing, segment, before)
        assert all(torch.equal(old, new) for old, new in zip(before.tensors, after.tensors, strict=True))


def test_tokens_long_past_get_no_subnormal_weights_and_still_the_answer_of_the_equations():
    layer, bank = bank_layer(), random(B, J, W)
    with torch.no_grad():
        layer.recency_slope.fill_(0.6)
    residual = torch.cat([random(B, 30, D, seed=2), torch.zeros(B, 150, D)], dim=1)  # only faint tokens have a value
    everything = torch.ones(B, 180, dtype=torch.bool)
    found, _ = layer.update(bank, gathered(layer, bank, residual, []))
    assert torch.allclose(found, direct_update(layer, bank, residual, everything), atol=1e-12)
    single = gathered(layer.float(), bank.float(), residual.float(), []).value.abs()
    assert not ((single > 0) & (single < torch.finfo(torch.float32).tiny)).any()


def test_the_online_write_has_the_gradients_of_the_equations():
    layer, bank = bank_layer(), random(B, J, W)
    mask = torch.ones(B, 13, dtype=torch.bool)
    gradients = []
    for direct in (True, False):
        layer.zero_grad()
        start, residual = bank.clone().requires_grad_(), random(B, 13, D, seed=2).requires_grad_()
        if direct:
            updated = direct_update(layer, start, residual, mask)
        else:
            updated, _ = layer.update(start, gathered(layer, start, residual, [5, 6]))
        (updated * random(B, J, W, seed=9)).sum().backward()
        parameters = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        gradients.append([start.grad, residual.grad, *parameters])
    for expected, found in zip(*gradients, strict=True):
        assert torch.allclose(expected, found, atol=1e-12)


def test_reading_is_the_gated_attention_of_the_equations():
    layer, bank, x = bank_layer(), random(B, J, W), random(B, 6, D, seed=3)
    term, weights, _ = layer.read(x, opened(layer, bank), wants_weights=True)
    assert torch.allclose(layer.read(x, opened(layer, bank)).term, term, atol=1e-12)
    hat, d = rms_normalise(bank), W // H
    retrieved = torch.zeros(B, 6, W, dtype=torch.float64)
    for head in range(H):
        part = slice(head * d, (head + 1) * d)
        query, key = (x @ layer.read_query.weight.T)[..., part], (hat @ layer.read_key.weight.T)[..., part]
        attention = (query @ key.transpose(1, 2) / math.sqrt(d)).softmax(-1)
        assert torch.allclose(attention, weights[:, head], atol=1e-12)
        retrieved[..., part] = attention @ (hat @ layer.read_value.weight.T)[..., part]
    expected = (torch.sigmoid(layer.output_gate(retrieved)) * retrieved) @ layer.output.weight.T
    assert torch.allclose(term, expected, atol=1e-12)


def test_top_k_reads_use_k_slots_per_head():
    layer = bank_layer(read_top_k=2)
    weights = layer.read(random(B, 6, D), opened(layer, random(B, J, W))).weights
    assert ((weights > 0).sum(-1) == 2).all()
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize(("slots", "width"), [(4, 9), (9, 9), (40, 6), (300, 2)])
def test_the_initial_bank_has_distinct_unit_rows_and_is_the_identity_where_it_can(slots, width):
    bank = initial_bank(slots, width)
    assert torch.allclose(bank.norm(dim=-1), torch.ones(slots), atol=1e-6)
    diagonal = min(slots, width)
    assert torch.equal(bank[:diagonal], torch.eye(diagonal, width))
    assert (bank[:, None] - bank[None]).norm(dim=-1).add(torch.eye(slots) * 9).min() > 1e-6
    assert torch.equal(bank, initial_bank(slots, width))


def test_a_later_token_counts_more_where_the_recency_slope_is_positive():
    layer, bank = bank_layer(), random(B, J, W)
    token = random(1, 1, D).expand(B, 10, D)  # ten equal tokens: only their order differs
    assert layer.recency_slope.tolist() == [0.0, 0.05000000074505806, 0.20000000298023224]
    keys = layer.write_key(token)
    assert torch.allclose(keys[:, 0], keys[:, -1])
    last = layer.gather(token, torch.arange(10)[None], None, opened(layer, bank), layer.empty_statistics(B, token))
    weights = torch.exp(layer.recency_slope[:, None] * (torch.arange(10) - 9))
    assert torch.allclose(last.total[0, :, 0], weights.sum(-1), atol=1e-9)


def test_a_stretched_gate_closes_and_opens_completely_and_starts_at_the_retention():
    layer = bank_layer(retention=0.9, gate_stretch=0.1)
    for gate in (layer.input_gate, layer.forget_gate, layer.forget_gate_bank):
        gate.weight.data.zero_()
    statistics = layer.gather(random(B, 6, D), torch.arange(6)[None], None, opened(layer, random(B, J, W)),
                              layer.empty_statistics(B, random(1)))  # fmt: skip
    bank = random(B, J, W, seed=2)
    assert torch.allclose(layer.update(bank, statistics)[1].forget_gate, torch.full((B, J, W), 0.9).double())
    layer.forget_gate.bias.data.fill_(4.0)
    layer.input_gate.bias.data.fill_(-4.0)
    assert torch.equal(layer.update(bank, statistics)[0], bank)  # an irrelevant segment leaves no trace at all


@pytest.mark.parametrize("stretch", [0.0, 0.1])
def test_the_skip_gate_mixes_the_updated_slot_with_the_old_one(stretch):
    layer = bank_layer(gate_stretch=stretch, skip_gate=True)
    start, bank, residual = random(B, J, W), random(B, J, W, seed=1), random(B, 6, D, seed=2)
    statistics = layer.gather(
        residual, torch.arange(6)[None], None, opened(layer, start), layer.empty_statistics(B, residual)
    )
    updated, gates = layer.update(bank, statistics)

    skip, layer.skip_gate = layer.skip_gate, None
    always, plain_gates = layer.update(bank, statistics)
    content = (statistics.value / statistics.total[..., None]).transpose(1, 2).flatten(-2)
    share = ((1 + 2 * stretch) * torch.sigmoid(skip(content)) - stretch).clamp(0, 1)
    assert share.shape == (B, J, 1)
    assert torch.allclose(updated, share * always + (1 - share) * bank, atol=1e-12)
    assert torch.allclose(gates.input_gate, share * plain_gates.input_gate)

    if stretch:
        layer.skip_gate = skip
        skip.bias.data.fill_(-40.0)
        assert torch.equal(layer.update(bank, statistics)[0], bank)  # passed by: no bit changes


def test_a_convolution_of_the_write_begins_as_none_and_coupled_gates_keep_what_was_asked_for():
    residual, bank = random(B, 7, D, seed=2), random(B, J, W)
    plain, convolving = bank_layer(), MemoryBank(D, J, W, H, retention=0.73, write_conv=4).double()
    for parameter, value in convolving.initial_values():
        parameter.data.copy_(value)
    convolving.load_state_dict(plain.state_dict(), strict=False)
    found = [layer.update(bank, gathered(layer, bank, residual, [3]))[0] for layer in (plain, convolving)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-14)

    coupled = MemoryBank(D, J, W, H, retention=0.73, coupled_gates=True).double()
    for parameter, value in coupled.initial_values():
        parameter.data.copy_(value)
    gates = coupled.update(bank, gathered(coupled, bank, residual, [3]))[1]
    torch.testing.assert_close(gates.forget_gate, torch.full_like(gates.forget_gate, 0.73))
    torch.testing.assert_close(gates.input_gate, 1 - gates.forget_gate)
