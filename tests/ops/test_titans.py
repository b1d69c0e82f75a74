"""Titans against its definition and its special cases."""

import pytest
import torch
from torch.nn import functional as F

from mnemon.ops import get_rule
from mnemon.ops.checks import CHECKS, check_declared_size

TITANS = get_rule("titans")
B, H, K, V = 2, 2, 4, 5
OPTIONS = [
    {"mini_batch_size": 6},
    {"mini_batch_size": 100},
    {"memory": "mlp", "mini_batch_size": 6, "expansion": 2},
]


def inputs(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return TITANS.random_inputs(B, tokens, H, K, V, seed=seed, dtype=torch.float64)


def network(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return F.gelu(x @ memory[:K]) @ memory[K:].T


def matrix(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return x @ memory


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if check is not check_declared_size],  # declared is the size with the defaults
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_mini_batches_keep_the_contract(options, check) -> None:
    check(TITANS, options)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.parametrize("mini_batch_size", [1, 4])
@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_every_token_is_a_gradient_step_with_momentum(memory: str, mini_batch_size: int, form: str) -> None:
    call = inputs(11)
    options = {"memory": memory, "mini_batch_size": mini_batch_size, "expansion": 2}
    _, start = TITANS.recurrent(**inputs(mini_batch_size, seed=5), **options)
    output, state = getattr(TITANS, form)(**call, **options, state=start)
    function = matrix if memory == "matrix" else network

    def loss(weights, key, value):
        return (function(key, weights) - value).square().sum()

    for row in range(B):
        for head in range(H):
            weights = anchor = start.memory[row, head]
            running = start.momentum[row, head]
            for token in range(11):
                q, k, v, lr, momentum, g = (
                    call[name][row, token, head] for name in ("q", "k", "v", "lr", "momentum", "g")
                )
                running = momentum * running - lr * torch.func.grad(loss)(anchor, k, v)
                weights = g.exp() * weights + running
                torch.testing.assert_close(output[row, token, head], function(q, weights), rtol=1e-10, atol=1e-10)
                if (token + 1) % mini_batch_size == 0:
                    anchor = weights
            torch.testing.assert_close(state.memory[row, head], weights, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state.momentum[row, head], running, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_without_momentum_and_forgetting_it_is_the_delta_rule_at_twice_the_step(form: str) -> None:
    call = inputs(70)
    call["lr"] = 5 * call["lr"]  # up to 1/2, where the delta rule's beta is 1
    nothing = torch.zeros_like(call["lr"])
    output, state = getattr(TITANS, form)(**{**call, "momentum": nothing, "g": nothing})
    expected, memory = get_rule("delta_net").recurrent(call["q"], call["k"], call["v"], beta=2 * call["lr"])
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.memory, memory, rtol=1e-10, atol=1e-10)


def test_forgetting_without_momentum_decays_before_the_write() -> None:
    """M_t = e^g M - 2 lr k^T (k M - v): what is read for the error has not decayed yet, unlike in Gated DeltaNet."""
    call = inputs(9)
    call["momentum"] = torch.zeros_like(call["lr"])
    memory = torch.zeros(B, H, K, V, dtype=torch.float64)
    for token in range(9):
        k, v, lr, g = (call[name][:, token] for name in ("k", "v", "lr", "g"))
        error = torch.einsum("bhk,bhkv->bhv", k, memory) - v
        memory = g.exp()[..., None, None] * memory - 2 * torch.einsum("bhk,bhv->bhkv", lr[..., None] * k, error)
    torch.testing.assert_close(TITANS.chunkwise(**call)[1].memory, memory, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", ["matrix", "mlp"])
@pytest.mark.parametrize("name", ["mini_batch_size", "expansion"])
def test_settings_change_the_answer_where_they_apply(memory: str, name: str) -> None:
    call = inputs(20)
    default, other = (TITANS(**call, memory=memory, **{name: value})[0] for value in (4, 7))
    has_effect = memory == "mlp" or name == "mini_batch_size"
    assert torch.equal(default, other) != has_effect


def test_a_network_starts_from_weights_that_can_learn() -> None:
    output, state = TITANS(**inputs(30), memory="mlp", mini_batch_size=4)
    assert output.abs().max() > 0.1
    assert all(leaf.abs().max() > 1e-3 for leaf in state[:3])
