"""Several routed memories, for every registered rule: all ways to compute them against the dense definition."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from layer_cases import D, H, K, assert_identical, assert_same, every_rule, random
from torch.utils._python_dispatch import TorchDispatchMode

from mnemon.errors import ConfigError, ShapeError, StateError
from mnemon.layers import mixture_of_memories, routing
from mnemon.layers.convolution import ShortConvolution
from mnemon.layers.linear_memory import LinearMemory
from mnemon.layers.mixture_of_memories import MixtureOfMemories, MixtureState
from mnemon.layers.projection import GroupedProjection, Groups
from mnemon.ops.state import leaves

T = 10
every_dispatch = pytest.mark.parametrize("dispatch", ["packed", "in_turn", "dense"])

# How the same tokens may be read: in one call or in several, of one token or more.
WAYS = {
    "packed": ("packed", [T]),
    "in turn": ("in_turn", [T]),
    "packed in pieces": ("packed", [4, 0, 1, 5]),
    "in turn in pieces": ("in_turn", [1, 6, 3]),
    "dense in pieces": ("dense", [3, 1, 6]),
    "token by token": ("auto", [1] * T),
}
VARIANTS = {
    "masked": {"masked": True},
    "one projection": {"single_kv_proj": True},
    "capacity": {"capacity": 0.4, "shared_memory": False, "masked": True},
    "all memories, no convolution": {"top_k": 3, "conv_size": 0},
}
MASK = torch.rand(3, T, generator=torch.Generator().manual_seed(2)) < 0.7
MASK[0, :5], MASK[2] = False, False
BEFORE = torch.ones(3, 6, dtype=torch.bool)
BEFORE[1, 2:] = False


def mixture(options: dict, dtype: torch.dtype = torch.float64, **more) -> MixtureOfMemories:
    torch.manual_seed(1)
    sizes = {"hidden_size": D, "num_heads": H, "head_dim": K, "num_memories": 3, "layer_index": 1, "num_layers": 2}
    return MixtureOfMemories(**{**sizes, **options, **more}).to(dtype)


def read(
    layer: MixtureOfMemories,
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    state: MixtureState | None = None,
    dispatch: str = "auto",
    lengths: list[int] | None = None,
) -> tuple[torch.Tensor, MixtureState]:
    """Read tokens in calls of these lengths."""
    layer.dispatch = dispatch
    lengths = [x.shape[1]] if lengths is None else lengths
    outputs = []
    masks = [None] * len(lengths) if mask is None else mask.split(lengths, dim=1)
    for piece, counted in zip(x.split(lengths, dim=1), masks, strict=True):
        output, state, _ = layer(piece, counted, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def through(layer: MixtureOfMemories, mask: torch.Tensor | None, way: tuple) -> tuple:
    """Read tokens one way, after others read densely; return outputs, state and the gradients of all that went in."""
    x, earlier = random(3, T, D).requires_grad_(), random(3, 6, D, seed=4).requires_grad_()
    start = read(layer, earlier, BEFORE, dispatch="dense")[1]
    output, state = read(layer, x, mask, start, *way)
    output = output if mask is None else output[mask]
    loss = (output * random(*output.shape, seed=7)).sum()
    for number, tensor in enumerate(tensor for tensor in state.tensors if tensor.is_floating_point()):
        loss = loss + (tensor * random(*tensor.shape, seed=number)).sum()
    inputs = {"the tokens": x, "the state": earlier, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return output, state, dict(zip(inputs, gradients, strict=True))


@every_rule
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_equals_the_definition_in_outputs_state_and_gradients(options: dict, variant: str) -> None:
    changes = dict(VARIANTS[variant])
    mask = MASK if changes.pop("masked", False) else None
    layer = mixture(options, **changes)
    expected, end, gradients = through(layer, mask, ("dense", [T]))
    assert gradients["the state"].abs().max() > 0
    for name in WAYS if variant == "masked" else ("packed", "in turn", "token by token"):
        output, state, slopes = through(layer, mask, WAYS[name])
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
        assert_same(state, end)
        for what, gradient in gradients.items():
            difference = (slopes[what] - gradient).abs().max() / gradient.abs().max().clamp_min(1)
            assert difference < 1e-9, f"{name}: the gradient of {what}"


@every_rule
@every_dispatch
def test_padding_anywhere_equals_no_padding(options: dict, dispatch: str) -> None:
    layer, x = mixture(options), random(3, T, D)
    _, start = read(layer, random(3, 3, D, seed=4))
    output, end = read(layer, x, MASK, start, dispatch)
    for row in range(3):
        one = start.with_tensors([tensor[row : row + 1] for tensor in start.tensors])
        expected, state = read(layer, x[row : row + 1, MASK[row]], None, one, dispatch)
        torch.testing.assert_close(output[row : row + 1, MASK[row]], expected, rtol=1e-10, atol=1e-10)
        assert_same(end.with_tensors([tensor[row : row + 1] for tensor in end.tensors]), state)


@every_rule
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_one_memory_that_gets_everything_is_exactly_the_single_memory(options: dict, masked: bool) -> None:
    several = mixture(options, num_memories=1, top_k=1, shared_memory=False)
    torch.manual_seed(5)
    one = LinearMemory(D, num_heads=H, head_dim=K, layer_index=1, num_layers=2, **options).double()
    weights = {name: one.state_dict()[name] for name in several.state_dict() if not name.startswith("router.")}
    assert len(weights) == len(one.state_dict())
    with torch.no_grad():
        for name, parameter in several.named_parameters():
            if name in weights:
                parameter.copy_(weights[name].view(parameter.shape))
    x, mask = random(3, T, D), MASK if masked else None
    state = mixed = None
    for piece in (slice(0, 6), slice(6, 7), slice(7, T)):
        counted = None if mask is None else mask[:, piece]
        expected, state = one(x[:, piece], counted, state)
        for dispatch in ("packed", "dense", "in_turn"):
            output, after = read(several, x[:, piece], counted, mixed, dispatch)
            found = after.memories.map(lambda tensor: tensor[:, 0])
            real = (
                torch.ones_like(output, dtype=torch.bool) if counted is None else counted[..., None].expand_as(output)
            )
            if masked or dispatch == "packed":  # matrix products of other shapes round differently
                torch.testing.assert_close(output[real], expected[real], rtol=1e-12, atol=1e-12)
                assert_same(found, state)
            else:
                assert torch.equal(output, expected)
                assert_identical(found, state)
        mixed = after


def changes_before(layer: MixtureOfMemories, cut: int, dispatch: str) -> float:
    """Change the tokens from `cut` on, and return the largest change of an earlier output."""
    x = random(2, 40, D)
    changed = torch.cat([x[:, :cut], random(2, 40 - cut, D, seed=5)], dim=1)
    before, after = (read(layer, tokens, dispatch=dispatch)[0] for tokens in (x, changed))
    assert (before - after)[:, cut:].abs().max() > 1e-3
    return (before - after)[:, :cut].abs().max().item()


@every_rule
@every_dispatch
def test_a_later_token_never_changes_an_earlier_output(options: dict, dispatch: str) -> None:
    layer = mixture(options)
    assert max(changes_before(layer, cut, dispatch) for cut in (1, 17, 39)) < 1e-10


def test_a_convolution_that_runs_on_from_one_packed_sequence_to_the_next_would_be_noticed(monkeypatch) -> None:
    def leaky(self: ShortConvolution, x: torch.Tensor, tail: torch.Tensor, _: torch.Tensor) -> tuple:
        return self._slide(x), tail

    monkeypatch.setattr(ShortConvolution, "packed", leaky)
    assert changes_before(mixture({"rule": "gated_delta_net"}), 17, "packed") > 1e-3


@every_rule
@every_dispatch
def test_rows_do_not_see_each_other(options: dict, dispatch: str) -> None:
    layer, x = mixture(options), random(2, 20, D)
    other = torch.cat([x[:1], random(1, 20, D, seed=5)])
    (output, state), (changed, after) = (read(layer, rows, dispatch=dispatch) for rows in (x, other))
    torch.testing.assert_close(output[0], changed[0], rtol=1e-10, atol=1e-10)
    assert (output[1] - changed[1]).abs().max() > 1e-3
    assert_same(*(s.with_tensors([tensor[:1] for tensor in s.tensors]) for s in (state, after)))


def steer(layer: MixtureOfMemories, x: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
    """Set the router so that every token of x goes to the memories given for it [B, T, k]; return such tokens."""
    count = layer.num_memories
    with torch.no_grad():
        layer.router.logits.weight.zero_()
        layer.router.logits.weight[:, :count] = 9.0 * torch.eye(count, dtype=layer.router.logits.weight.dtype)
    wanted = torch.zeros(*x.shape[:2], count, dtype=x.dtype)
    for rank in range(memories.shape[-1]):
        wanted.scatter_(2, memories[..., rank, None], 1 - 0.1 * rank)
    return torch.cat([wanted, x[..., count:]], dim=-1)


@every_rule
@every_dispatch
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_memory_that_no_token_goes_to_is_neither_written_nor_decayed(options, dispatch, tokens) -> None:
    layer = mixture(options)
    _, start = read(layer, random(2, 11, D), dispatch=dispatch)
    x = steer(layer, random(2, tokens, D, seed=1), torch.tensor([0, 2]).expand(2, tokens, 2))
    _, end = read(layer, x, None, start, dispatch)
    for before, after in zip(start.memories.tensors, end.memories.tensors, strict=True):
        assert torch.equal(before[:, 1], after[:, 1])
    assert end.memories.position[:, 1].tolist() == start.memories.position[:, 1].tolist()
    for number in (0, 2, 3):
        assert (end.memories.position - start.memories.position)[:, number].tolist() == [tokens] * 2
        assert not torch.equal(start.memories.tail[:, number], end.memories.tail[:, number])


@every_rule
@every_dispatch
def test_what_goes_to_one_memory_never_shows_in_another(options: dict, dispatch: str) -> None:
    layer = mixture(options, top_k=1, shared_memory=False)
    places = torch.tensor([[0, 1, 2, 1, 0, 2, 1, 0, 2, 1]])[..., None].expand(2, T, 1)
    x = steer(layer, random(2, T, D), places)
    other = x.clone()
    other[:, 3, 3:] = random(2, D - 3, seed=5)  # a token of memory 1
    (output, state), (changed, after) = (read(layer, tokens, dispatch=dispatch) for tokens in (x, other))
    elsewhere = places[..., 0] != 1
    torch.testing.assert_close(output[elsewhere], changed[elsewhere], rtol=1e-12, atol=1e-12)
    assert (output - changed)[0, 6].abs().max() > 1e-6  # the next token of memory 1
    for number in (0, 2):
        assert_same(*(s.memories.map(lambda tensor, n=number: tensor[:, n]) for s in (state, after)))


@every_rule
@every_dispatch
def test_masked_tokens_and_calls_without_tokens_leave_the_state_exactly_as_it_was(options, dispatch) -> None:
    layer = mixture(options)
    _, start = read(layer, random(2, 7, D), dispatch=dispatch)
    kept = [tensor.clone() for tensor in start.tensors]
    for tokens in (0, 1, 9):
        x = random(2, tokens, D, seed=1)
        output, end = read(layer, x, torch.zeros(2, tokens, dtype=torch.bool), start, dispatch)
        assert output.shape == x.shape
        assert_identical(end, start)
        mask = torch.tensor([True, False])[:, None].expand(2, tokens)
        _, end = read(layer, x, mask, start, dispatch)
        assert_identical(*(s.with_tensors([tensor[1:] for tensor in s.tensors]) for s in (end, start)))
    output, end = read(layer, random(2, 0, D), None, start, dispatch)
    assert output.shape == (2, 0, D)
    assert_identical(end, start)
    assert all(torch.equal(a, b) for a, b in zip(kept, start.tensors, strict=True))  # nothing was changed in place


@every_rule
def test_nothing_stays_on_the_layer(options: dict) -> None:
    layer, x = mixture(options), random(2, 9, D)
    first, _ = read(layer, x)
    read(layer, random(3, 5, D))
    again, _ = read(layer, x)
    assert torch.equal(first, again)
    assert list(layer.buffers()) == []


@every_rule
@pytest.mark.parametrize("dispatch", ["packed", "in_turn"])
def test_bfloat16_keeps_the_memories_in_float32_and_stays_close(options: dict, dispatch: str) -> None:
    # Norms over a handful of numbers would blow up the rounding of some tokens: 24 and 8, not 12 and 4.
    rounded = mixture(options, torch.bfloat16, hidden_size=2 * D, head_dim=2 * K)
    exact = mixture(options, torch.float32, hidden_size=2 * D, head_dim=2 * K)
    exact.load_state_dict(rounded.state_dict())
    x = random(2, 40, 2 * D).bfloat16()
    output, state = read(rounded, x, dispatch=dispatch)
    expected, _ = read(exact, x.float(), dispatch=dispatch)
    assert output.dtype == state.memories.tail.dtype == torch.bfloat16
    assert all(leaf.dtype in (torch.float32, torch.int64) for leaf in leaves(state.memories.memory))
    assert (output - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()
    output, after = read(rounded, x[:, :1], None, state, dispatch)
    assert output.dtype == torch.bfloat16
    assert [tensor.dtype for tensor in after.tensors] == [tensor.dtype for tensor in state.tensors]


@every_rule
@pytest.mark.parametrize("dispatch", ["packed", "in_turn"])
def test_autocast_keeps_gates_router_and_memories_in_float32(options: dict, dispatch: str) -> None:
    layer, x = mixture(options, torch.float32), random(2, 20, D).float()
    expected, _ = read(layer, x, dispatch=dispatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = read(layer, x, dispatch=dispatch)
        read(layer, x[:, :1], None, read(layer, x, None, state, dispatch)[1], dispatch)
    assert all(leaf.dtype in (torch.float32, torch.int64) for leaf in leaves(state.memories.memory))
    assert (output - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


@every_rule
def test_gradients_reach_every_parameter_the_router_included(options: dict) -> None:
    layer = mixture(options)
    output, _ = read(layer, random(2, 20, D))
    (output * random(2, 20, D, seed=3)).sum().backward()
    without = [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_with_a_single_choice_the_answers_tell_the_router_nothing() -> None:
    layer = mixture({"rule": "gla"}, top_k=1)
    output, _ = read(layer, random(2, 20, D))
    output.square().sum().backward()
    gradient = layer.router.logits.weight.grad  # p / p is 1 whatever p is
    assert gradient is None or gradient.abs().max() < 1e-12


def groups_of(memories: list[int], on_host: bool) -> Groups:
    memory = torch.tensor(memories, dtype=torch.int64)
    return Groups(memory, torch.bincount(memory, minlength=3).tolist() if on_host else None)


@pytest.mark.parametrize("memories", [[0, 0, 1, 2, 2], [0, 0, 0, 2, 2], [1, 1, 1, 1, 1], []], ids=str)
@pytest.mark.parametrize("bias", [None, "shared", "memory"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_grouped_projection_multiplies_each_row_with_the_matrix_of_its_memory(memories, bias, dtype) -> None:
    torch.manual_seed(0)
    projection = GroupedProjection(3, D, 5, bias)
    for parameter in projection.parameters():
        torch.nn.init.normal_(parameter)
    projection = projection.to(dtype)
    x = random(1, len(memories), D).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for on_host in (True, False):
        groups = groups_of(memories, on_host)
        y, precise = projection(x, groups), projection.wide(x, groups)
        assert (y.dtype, precise.dtype) == (dtype, wide)
        inputs = [x, *projection.parameters()]
        loss = y.to(wide).sum() + precise.square().sum() + x.sum()
        slopes = torch.autograd.grad(loss, inputs, materialize_grads=True, allow_unused=True)
        results.append((y, precise, *slopes))
    for row, memory in enumerate(memories):
        expected = projection.weight[memory].to(wide) @ x[0, row].to(wide)
        if bias:
            expected = expected + (projection.bias if bias == "shared" else projection.bias[memory]).to(wide)
        torch.testing.assert_close(results[0][1][0, row], expected)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-12}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@every_rule
def test_a_device_that_nobody_waits_for_computes_the_same(options: dict, monkeypatch) -> None:
    """Without row counts on the host all rows meet all matrices: what runs on an accelerator."""
    layer, x = mixture(options), random(3, T, D)
    expected, end = read(layer, x, MASK, dispatch="packed")
    one, after = read(layer, x[:, :1], None, end, "packed")

    def uncounted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            layout = function(*args, **kwargs)
            return layout._replace(groups=layout.groups._replace(counts=None))

        return call

    monkeypatch.setattr(mixture_of_memories, "pack", uncounted(routing.pack))
    monkeypatch.setattr(mixture_of_memories, "step", uncounted(routing.step))
    monkeypatch.setattr(GroupedProjection, "_multiply_groups", None)
    output, state = read(layer, x, MASK, dispatch="packed")
    torch.testing.assert_close(output[MASK], expected[MASK], rtol=1e-11, atol=1e-11)
    assert_same(state, end)
    output, state = read(layer, x[:, :1], None, end, "packed")
    torch.testing.assert_close(output, one, rtol=1e-11, atol=1e-11)
    assert_same(state, after)


@every_rule
def test_a_decoding_step_never_makes_the_host_wait_for_a_device(options: dict, monkeypatch) -> None:
    """Tensors on the meta device have no values: whoever asks for one is told so."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which knows no meta device
    with torch.device("meta"):
        layer = mixture(options)
        x, mask = torch.empty(2, 1, D, dtype=torch.float64), torch.ones(2, 1, dtype=torch.bool)
    for counted in (None, mask):
        output, state = read(layer, x, counted)
        output, _ = read(layer, x, counted, state)
        assert output.is_meta
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|data-independent"):
        read(layer, x.expand(2, 2, D), dispatch="in_turn")  # the check sees a question


@pytest.mark.parametrize("dispatch", ["packed", "dense"])
def test_the_numbers_of_memories_are_on_the_device_of_the_tokens(dispatch: str, monkeypatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"):
        layer, x = mixture({"rule": "gla"}), torch.empty(2, 1, D, dtype=torch.float64)
    devices = []
    layer.v_proj.register_forward_pre_hook(lambda _, args: devices.append(args[1].memory.device.type))
    read(layer, x, dispatch=dispatch)
    assert set(devices) == {"meta"}


class CountOperations(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@every_rule
@every_dispatch
@pytest.mark.parametrize("tokens", [1, 6])
def test_the_work_of_the_host_does_not_grow_with_the_batch(options, dispatch, tokens, monkeypatch) -> None:
    layer = mixture(options)
    calls: list[int] = []
    remember = layer.remember
    monkeypatch.setattr(layer, "remember", lambda *args, **kwargs: calls.append(1) or remember(*args, **kwargs))
    found = []
    for batch in (2, 24):
        places = torch.tensor([[0, 1], [1, 2], [2, 0]] * 2)[:tokens].expand(batch, tokens, 2)
        x = steer(layer, random(batch, tokens, D), places)
        start = layer.initial_mixture(batch, x)
        calls.clear()
        with CountOperations() as operations, torch.no_grad():
            read(layer, x, None, start, dispatch)
        found.append((len(calls), operations.count))
    assert found[0] == found[1]
    assert found[0][0] == (1 if dispatch == "packed" or (tokens == 1 and dispatch != "dense") else layer.total)


@every_rule
@every_dispatch
def test_a_token_touches_the_parameters_of_its_own_memories_alone(options: dict, dispatch: str) -> None:
    layer = mixture(options)
    places = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [0, 2]]).expand(2, 5, 2)
    x = steer(layer, random(2, 5, D), places)
    own = [p for m in layer.modules() if isinstance(m, GroupedProjection) for p in m.own_parameters()]
    assert sum(parameter[0].numel() for parameter in own) == layer.num_idle_parameters()  # 3 memories, 2 per token
    expected, _ = read(layer, x, dispatch=dispatch)
    for parameter in own:
        with torch.no_grad():
            kept = parameter[1].clone()
            parameter[1] += torch.randn_like(kept)  # a NaN would be refused: gates are checked for their range
        output, _ = read(layer, x, dispatch=dispatch, lengths=[1, 4])
        changed = (output - expected).abs().amax(dim=-1) > 1e-10
        assert changed.any()
        assert not changed[(places != 1).all(dim=-1)].any()
        with torch.no_grad():
            parameter[1] = kept


def test_one_projection_for_all_leaves_nothing_idle() -> None:
    layer = mixture({"rule": "gated_delta_net"}, single_kv_proj=True)
    assert layer.num_idle_parameters() == 0
    assert not any(isinstance(module, GroupedProjection) for module in layer.modules())


@every_rule
def test_projections_start_at_the_size_that_keeps_the_size_of_the_tokens(options: dict) -> None:
    torch.manual_seed(0)
    layer = MixtureOfMemories(64, num_heads=4, head_dim=16, layer_index=1, num_layers=2, **options)
    for name, parameter in layer.named_parameters():
        if "proj" in name or name == "router.logits.weight":
            assert parameter.std().item() * parameter.shape[-1] ** 0.5 == pytest.approx(1, abs=0.15), name
    x = torch.nn.functional.rms_norm(torch.randn(2, 64, 64), (64,))
    added, _, _ = layer(x)
    assert 0.2 < added.square().mean().sqrt() < 2.5


@every_rule
def test_a_layer_without_memory_of_its_own_can_be_filled_later(options: dict) -> None:
    with torch.device("meta"):
        layer = mixture(options)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
        torch.manual_seed(1)
        for parameter, value in layer.initial_values():
            parameter.copy_(value)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert len(layer.initial_values()) == len(list(layer.parameters()))
    assert read(layer, random(1, 20, D))[0].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [{"num_memories": 2}, {"top_k": 1}, {"top_k": 3}, {"shared_memory": False}, {"single_kv_proj": True},
     {"capacity": 0.3}],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_answer_of_the_same_weights(change: dict) -> None:
    plain, other = mixture({"rule": "gla"}), mixture({"rule": "gla"}, **change)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            weight = plain.get_parameter(name)
            parameter.copy_((weight[0] if weight.ndim > parameter.ndim else weight)[: len(parameter)])
    x = random(1, 20, D)
    assert (read(plain, x)[0] - read(other, x)[0]).abs().max() > 1e-3


def test_no_form_but_the_one_named_runs(monkeypatch) -> None:
    layer, x = mixture({"rule": "gla"}), random(2, 9, D)
    ways = {"dense": "_dense", "packed": "_packed", "in_turn": "_in_turn", "auto": "_in_turn"}  # auto on a CPU
    for dispatch, method in ways.items():
        with monkeypatch.context() as patch:
            for other in {"_dense", "_packed", "_in_turn", "_one_token"} - {method}:
                patch.setattr(layer, other, None)
            read(layer, x, dispatch=dispatch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_memories": 0}, "num_memories must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 4}, "top_k=4 exceeds num_memories=3; lower top_k or add memories"),
        ({"capacity": 0.0}, r"capacity must be above 0 \(1 or null = no limit\), got 0.0"),
        ({"capacity": -0.5}, "capacity must be above 0"),
        ({"dispatch": "fast"}, "dispatch must be one of auto, packed, in_turn, dense, got 'fast'"),
        ({"rule": "hgrn"}, "no update rule is called 'hgrn'; did you mean 'hgrn2'"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"conv_size": -1}, "conv_size must be at least 0"),
        ({"form": "fast"}, "form must be one of"),
    ],
    ids=str,
)
def test_impossible_layers_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        mixture({"rule": "gla"}, **options)
    assert "\n" not in str(caught.value)


@every_dispatch
def test_impossible_inputs_are_refused(dispatch: str) -> None:
    layer, x = mixture({"rule": "gla"}, dispatch=dispatch), random(2, 5, D)
    with pytest.raises(ShapeError, match=r"expected hidden states \[B, T, 12\], got \[2, 5, 11\]"):
        layer(x[..., 1:])
    with pytest.raises(ShapeError, match=r"mask must be bool \[2, 5\], got torch.int64 \[2, 5\]"):
        layer(x, torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(StateError, match="belongs to another layer, batch or precision"):
        layer(x, state=layer(x[:1])[1])
    with pytest.raises(StateError, match="belongs to another layer, batch or precision"):
        layer(x, state=mixture({"rule": "gla"}, num_memories=2)(x)[1])
    with pytest.raises(StateError, match="belongs to another layer, batch or precision"):
        layer(x, state=mixture({"rule": "gla"}, torch.float32)(x.float())[1])
    with pytest.raises(StateError, match="must be a MixtureState, got a LinearMemoryState"):
        layer(x, state=layer(x)[1].memories)
