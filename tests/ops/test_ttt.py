"""TTT against its definition: gradient descent on the inner loss, differentiated by autograd."""

import pytest
import torch
from torch.nn import functional as F

from mnemon.errors import ShapeError
from mnemon.ops import get_rule

TTT = get_rule("ttt")
B, H, D = 2, 2, 5


def inner_model(x, memory, weight, bias):
    """f(x) = x + LN(x W + b) for one head; the last row of the memory is b."""
    z = x @ memory[:-1] + memory[-1]
    return x + F.layer_norm(z, z.shape[-1:], weight, bias, eps=1e-6)


def descend(inputs, start, mini_batch_size):
    """Read token by token; every gradient is autograd's, at the weights the mini-batch began with."""
    outputs = torch.zeros_like(inputs["v"])
    memories = start.clone()
    for row in range(B):
        for head in range(H):
            weight, bias = inputs["weight"][head], inputs["bias"][head]
            memory = anchor = start[row, head]
            for token in range(inputs["q"].shape[1]):
                q, k, v, lr = (inputs[name][row, token, head] for name in ("q", "k", "v", "lr"))
                point = anchor.clone().requires_grad_()
                loss = 0.5 * (inner_model(k, point, weight, bias) - v).square().sum()
                memory = memory - lr * torch.autograd.grad(loss, point)[0]
                outputs[row, token, head] = inner_model(q, memory, weight, bias)
                if (token + 1) % mini_batch_size == 0:
                    anchor = memory
            memories[row, head] = memory
    return outputs, memories


@pytest.mark.parametrize("mini_batch_size", [1, 4, 16])
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_every_token_is_a_gradient_step_on_the_inner_loss(mini_batch_size: int, form: str) -> None:
    inputs = TTT.random_inputs(B, 21, H, D, D, seed=1, dtype=torch.float64)
    start = torch.randn(B, H, D + 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state = TTT.recurrent(**{**inputs, **{name: inputs[name][:, :0] for name in ("q", "k", "v", "lr")}})[1]
    state = state._replace(memory=start, anchor=start)
    output, state = getattr(TTT, form)(**inputs, state=state, mini_batch_size=mini_batch_size)
    expected, memory = descend(inputs, start, mini_batch_size)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.memory, memory, rtol=1e-10, atol=1e-10)


def test_the_mini_batch_changes_the_answer() -> None:
    inputs = TTT.random_inputs(B, 21, H, D, D, dtype=torch.float64)
    one, sixteen = (TTT.chunkwise(**inputs, mini_batch_size=size)[0] for size in (1, 16))
    torch.testing.assert_close(one[:, 0], sixteen[:, 0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(one[:, 1:], sixteen[:, 1:], atol=1e-3)


def test_the_state_carries_the_place_inside_the_mini_batch() -> None:
    inputs = TTT.random_inputs(B, 21, H, D, D, dtype=torch.float64)
    _, state = TTT.chunkwise(**inputs, mini_batch_size=8)
    assert state.position.tolist() == [5, 5]
    assert not torch.equal(state.memory, state.anchor)


def test_keys_and_values_of_different_width_are_refused() -> None:
    inputs = TTT.random_inputs(B, 3, H, D, D + 1)
    with pytest.raises(ShapeError, match="keys and values must have the same width, got 5 and 6"):
        TTT(**inputs)
