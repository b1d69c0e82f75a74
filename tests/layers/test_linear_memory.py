"""The contracts of the single-memory layer, for every registered rule."""

import itertools
import math

import pytest
import torch
from layer_cases import D, H, K, assert_identical, assert_same, every_rule, random

from mnemon.errors import ConfigError, ShapeError, StateError
from mnemon.layers import memory_layer
from mnemon.layers.conventions import conventions
from mnemon.layers.linear_memory import LinearMemory, LinearMemoryState
from mnemon.ops import UpdateRule, get_rule, list_rules
from mnemon.ops.declaration import GateSpec, Source
from mnemon.ops.state import leaves


def layer(options: dict, dtype: torch.dtype = torch.float64, **more) -> LinearMemory:
    torch.manual_seed(1)
    return LinearMemory(**{"hidden_size": D, "num_heads": H, "head_dim": K, **options, **more}).to(dtype)


def rows(state: LinearMemoryState, which: slice) -> LinearMemoryState:
    return state.map(lambda tensor: tensor[which])


@every_rule
@pytest.mark.parametrize("cuts", [[1], [2, 3, 17], list(range(1, 24))], ids=["early", "several", "every token"])
def test_calls_with_carried_state_equal_one_call(options: dict, cuts: list[int]) -> None:
    memory, x = layer(options), random(2, 24, D)
    expected, end = memory(x)
    state, outputs = None, []
    for part in x.tensor_split(cuts, dim=1):
        output, state = memory(part, state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-10, atol=1e-10)
    assert_same(state, end)


@every_rule
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_padding_anywhere_equals_no_padding(options: dict, form: str) -> None:
    memory, x = layer(options, form=form), random(3, 26, D)
    mask = torch.rand(3, 26, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[0], mask[1, :9] = True, False
    _, start = memory(random(3, 6, D, seed=4), torch.tensor([[1] * 6, [0] * 3 + [1] * 3, [1, 0, 0, 1, 0, 0]]).bool())
    output, end = memory(x, mask, start)
    for row in range(3):
        one = slice(row, row + 1)
        expected, state = memory(x[one, mask[row]], state=rows(start, one))
        torch.testing.assert_close(output[one, mask[row]], expected, rtol=1e-10, atol=1e-10)
        assert_same(rows(end, one), state)


@every_rule
def test_masked_tokens_leave_the_state_exactly_as_it_was(options: dict) -> None:
    memory = layer(options)
    _, start = memory(random(2, 7, D))
    _, end = memory(random(2, 9, D, seed=1), torch.zeros(2, 9, dtype=torch.bool), start)
    assert_identical(start, end)


@every_rule
def test_a_call_without_tokens_changes_nothing(options: dict) -> None:
    memory = layer(options)
    _, start = memory(random(2, 7, D))
    output, end = memory(random(2, 0, D), state=start)
    assert output.shape == (2, 0, D)
    assert_identical(start, end)


@every_rule
def test_packed_sequences_equal_separate_ones(options: dict) -> None:
    memory, bounds = layer(options), [0, 2, 2, 20, 21, 27]
    _, start = memory(random(5, 6, D, seed=4))
    x = random(1, bounds[-1], D)
    for state in (None, start):
        output, end = memory(x, state=state, cu_seqlens=torch.tensor(bounds))
        for row, (begin, stop) in enumerate(itertools.pairwise(bounds)):
            one = slice(row, row + 1)
            expected, alone = memory(x[:, begin:stop], state=None if state is None else rows(state, one))
            torch.testing.assert_close(output[:, begin:stop], expected, rtol=1e-10, atol=1e-10)
            assert_same(rows(end, one), alone)


@every_rule
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_a_later_token_never_changes_an_earlier_output(options: dict, form: str) -> None:
    memory, x = layer(options, form=form), random(2, 40, D)
    for cut in (1, 17, 39):
        changed = torch.cat([x[:, :cut], random(2, 40 - cut, D, seed=5)], dim=1)
        assert torch.equal(memory(x)[0][:, :cut], memory(changed)[0][:, :cut])


@every_rule
def test_rows_do_not_see_each_other(options: dict) -> None:
    memory, x = layer(options), random(2, 20, D)
    (output, state), (changed, other) = memory(x), memory(torch.cat([x[:1], random(1, 20, D, seed=5)]))
    assert torch.equal(output[0], changed[0])
    assert_identical(rows(state, slice(1)), rows(other, slice(1)))


@every_rule
@pytest.mark.parametrize("conv_size", [0, 3])
def test_gradients_reach_every_parameter(options: dict, conv_size: int) -> None:
    memory = layer(options, layer_index=1, num_layers=3, conv_size=conv_size)
    output, _ = memory(random(2, 20, D))
    (output * random(2, 20, D, seed=3)).sum().backward()
    without = [name for name, p in memory.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


@every_rule
def test_a_call_can_be_differentiated_through_the_state_of_an_earlier_one(options: dict) -> None:
    memory, x = layer(options), random(2, 9, D).requires_grad_()
    _, state = memory(x)
    (gradient,) = torch.autograd.grad(memory(random(2, 3, D, seed=1), state=state)[0].square().sum(), x)
    assert (gradient.abs().amax(dim=-1) > 0).all()


@every_rule
def test_the_output_starts_at_a_similar_size_at_every_depth_and_position(options: dict) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 256, 32)
    for index in range(0, 12, 3):
        memory = LinearMemory(32, num_heads=4, head_dim=8, layer_index=index, num_layers=12, **options)
        added, _ = memory(torch.nn.functional.rms_norm(x, (32,)))
        sizes = added.square().mean(dim=(0, 2)).sqrt()
        for part in (sizes[:32].mean(), sizes[-32:].mean()):
            assert 0.2 < part < 2.0
        x = x + added
    assert x.square().mean().sqrt() < 4


@every_rule
def test_bfloat16_keeps_the_memory_in_float32_and_stays_close(options: dict) -> None:
    # Norms over a handful of numbers would blow up the rounding of some tokens: 24 and 8, not 12 and 4.
    exact = layer(options, torch.float32, hidden_size=2 * D, head_dim=2 * K)
    rounded = layer(options, torch.bfloat16, hidden_size=2 * D, head_dim=2 * K)
    x = random(2, 40, 2 * D).bfloat16()
    output, state = rounded(x)
    expected, _ = exact(x.float())
    assert output.dtype == torch.bfloat16
    assert all(leaf.dtype in (torch.float32, torch.int64) for leaf in leaves(state.memory))
    assert (output - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()
    output, _ = rounded(x[:, :1], state=state)
    assert output.dtype == torch.bfloat16


@every_rule
def test_autocast_keeps_gates_and_memory_in_float32(options: dict) -> None:
    memory, x = layer(options, torch.float32), random(2, 20, D).float()
    expected, _ = memory(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = memory(x)
        memory(x, state=state)
    assert all(leaf.dtype in (torch.float32, torch.int64) for leaf in leaves(state.memory))
    assert (output - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


@every_rule
def test_a_layer_without_memory_of_its_own_can_be_filled_later(options: dict) -> None:
    with torch.device("meta"):
        memory = layer(options, layer_index=1, num_layers=3)
    assert all(parameter.is_meta for parameter in memory.parameters())
    memory.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.fill_(float("nan"))
        torch.manual_seed(1)
        for parameter, value in memory.initial_values():
            parameter.copy_(value)
    assert all(parameter.isfinite().all() for parameter in memory.parameters())
    assert len(memory.initial_values()) == len(list(memory.parameters()))
    assert memory(random(1, 20, D))[0].isfinite().all()


@every_rule
def test_nothing_stays_on_the_layer(options: dict) -> None:
    memory, x = layer(options), random(2, 9, D)
    first, _ = memory(x)
    memory(random(3, 5, D))
    again, _ = memory(x)
    assert torch.equal(first, again)
    assert list(memory.buffers()) == []


@every_rule
def test_the_state_handed_in_is_never_changed(options: dict) -> None:
    memory = layer(options)
    _, state = memory(random(2, 9, D))
    before = state.map(torch.clone)
    memory(random(2, 9, D, seed=1), state=state)
    assert_identical(before, state)


@pytest.mark.parametrize("rule", [name for name in list_rules() if not get_rule(name).equal_widths])
def test_keys_and_values_may_differ_in_width(rule: str) -> None:
    output, state = layer({"rule": rule}, value_dim=6, num_slots=3)(random(2, 5, D))
    assert output.shape == (2, 5, D)
    assert leaves(state.memory)[0].shape[1] == H


def outside_step(state, q, k, v, *, fade, strength, tilt):
    new = fade.exp()[..., None] * state + torch.einsum("bhk,bhv->bhkv", strength[..., None] * k, v + tilt)
    return torch.einsum("bhk,bhkv->bhv", q, new), new


OUTSIDE = UpdateRule(
    name="outside",
    equation="S ← Diag(exp(fade))S + strength·kᵀ(v + tilt);  o = q S",
    source=Source("A rule of another package", "0000.00000", "equation 1"),
    gates=(
        GateSpec("fade", "key", "log_decay", identity=0.0, meaning="log decay"),
        GateSpec("strength", "head", "positive", identity=0.0, meaning="write strength"),
        GateSpec("tilt", "value", "real", identity=0.0, meaning="added to the value"),
    ),
    init_state=lambda sizes, dtype, device: torch.zeros(
        sizes.sequences, sizes.heads, sizes.key_dim, sizes.value_dim, dtype=dtype, device=device
    ),
    step=outside_step,
    state_size="K*V",
    recurrent_flops="6*K*V",
)


def test_a_rule_of_another_package_gets_a_layer_from_its_declaration(monkeypatch) -> None:
    monkeypatch.setattr(memory_layer, "get_rule", {"outside": OUTSIDE}.__getitem__)
    memory, x = layer({"rule": "outside"}, value_dim=3), random(2, 20, D)
    expected, end = memory(x)
    head, state = memory(x[:, :7])
    tail, state = memory(x[:, 7:], state=state)
    torch.testing.assert_close(torch.cat([head, tail], dim=1), expected, rtol=1e-10, atol=1e-10)
    assert_same(state, end)
    expected.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in memory.parameters())


@pytest.mark.parametrize("rule", ["lightning", "hgrn2"])
def test_deeper_layers_remember_longer(rule: str) -> None:
    decays = [
        layer({"rule": rule}, layer_index=index, num_layers=4).gates["g"](random(1, 50, D)).mean() for index in range(4)
    ]
    assert decays == sorted(decays)
    assert decays[0] < decays[-1]


def test_retnets_decays_are_the_papers() -> None:
    g = layer({"rule": "retnet"}).gates["g"](random(1, 1, D))
    torch.testing.assert_close(g[0, 0].exp(), torch.tensor([1 - 1 / 32, 1 - 1 / 64], dtype=torch.float64))


def test_rotated_queries_and_keys_see_distances_only() -> None:
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=1)

    def product(at: int, distance: int) -> torch.Tensor:
        there, here = (memory_layer._rotate(x, torch.tensor([[p]])) for x, p in ((q, at + distance), (k, at)))
        return (there * here).sum()

    torch.testing.assert_close(product(0, 3), product(1_000_000, 3), rtol=1e-9, atol=1e-9)
    assert not math.isclose(product(0, 3).item(), product(0, 4).item(), rel_tol=1e-3)


def test_the_convolution_changes_the_answer_and_can_be_left_out() -> None:
    x = random(1, 8, D)
    outputs = [layer({"rule": "gla"}, conv_size=size)(x)[0] for size in (0, 1, 4)]
    assert not torch.allclose(outputs[0], outputs[2])
    assert not torch.allclose(outputs[1], outputs[2])
    assert layer({"rule": "gla"}, conv_size=0)(x)[1].tail.numel() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "hgrn"}, "no update rule is called 'hgrn'; did you mean 'hgrn2'"),
        ({"rule": "gla", "num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"rule": "gla", "form": "fast"}, "form must be one of auto, recurrent, chunkwise, fla, got 'fast'"),
        ({"rule": "gla", "conv_size": -1}, "conv_size must be at least 0"),
        ({"rule": "gla", "layer_index": 2, "num_layers": 2}, "layer_index must be between 0 and num_layers - 1 = 1"),
        ({"rule": "gla", "mini_batch_size": 4}, "gla: unknown setting 'mini_batch_size'; it takes none"),
        ({"rule": "titans", "memory": "tree"}, "titans: memory must be one of matrix, mlp, got 'tree'"),
        ({"rule": "ttt", "value_dim": 8}, "ttt needs value_dim = head_dim = 4, got 8; leave it out"),
        ({"rule": "retnet", "head_dim": 3}, "head_dim must be even, got 3"),
    ],
)
def test_impossible_layers_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer(options)


def test_impossible_inputs_are_refused() -> None:
    memory = layer({"rule": "gla"})
    x = random(2, 5, D)
    with pytest.raises(ShapeError, match=r"expected hidden states \[B, T, 12\], got \[2, 5, 11\]"):
        memory(x[..., 1:])
    with pytest.raises(ShapeError, match=r"mask must be bool \[2, 5\], got torch.int64 \[2, 5\]"):
        memory(x, torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(ShapeError, match="mask and cu_seqlens exclude each other"):
        memory(x[:1], torch.ones(1, 5).bool(), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ShapeError, match="needs a batch of 1"):
        memory(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(StateError, match="belongs to another layer, batch or precision"):
        memory(x, state=memory(x[:1])[1])
    with pytest.raises(StateError, match="must be a LinearMemoryState, got a tuple"):
        memory(x, state=tuple(memory(x)[1]))


WORDS = {
    None: "–",
    "identity": "–",
    "silu": "SiLU",
    "elu_plus_one": "elu + 1",
    "sigmoid": "sigmoid",
    "l2": "unit",
    "rms": "√K",
    "head": "per head",
    "width": "all heads",
    "layer": "LayerNorm",
}


@pytest.mark.parametrize("name", list_rules())
def test_the_documented_table_says_what_the_layer_does(name: str, repository) -> None:
    do = conventions(get_rule(name), 64, **get_rule(name).defaults())
    words = [WORDS[x] for x in (do.q_activation, do.k_activation, do.v_activation, do.qk_norm)]
    words[1] = f"from {do.keys_from}" if do.keys_from else words[1]
    words += ["1/√K" if do.scale_queries else "1", WORDS[do.output_norm], WORDS[do.output_gate]]
    row = "| " + " | ".join([f"`{name}`", *words]) + " |"
    assert row in (repository / "docs" / "linear-memory-layer.md").read_text(encoding="utf-8"), row
