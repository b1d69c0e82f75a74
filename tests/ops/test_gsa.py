"""Gated slot attention against its definition."""

import torch

from mnemon.ops import get_rule
from mnemon.ops.rules import gsa

RULE = get_rule("gsa")
B, T, H, K, V, J = 2, 37, 2, 4, 5, 3


def inputs() -> dict[str, torch.Tensor]:
    return RULE.random_inputs(B, T, H, K, V, slots=J, seed=3, dtype=torch.float64)


def slots(call: dict[str, torch.Tensor], content: torch.Tensor) -> torch.Tensor:
    """What each slot holds after each token, as the decayed sum it is: [B, T, H, J, D]."""
    held = torch.zeros(B, T, H, J, content.shape[-1], dtype=torch.float64)
    for token in range(T):
        for earlier in range(token + 1):
            decay = call["g"][:, earlier + 1 : token + 1].sum(1).exp()
            held[:, token] += (decay * call["s"][:, earlier])[..., None] * content[:, earlier, :, None]
    return held


def test_queries_attend_to_slots_that_are_decayed_sums() -> None:
    call = inputs()
    scores = torch.einsum("bthk,bthjk->bthj", call["q"], slots(call, call["k"]))
    expected = torch.einsum("bthj,bthjv->bthv", scores.softmax(-1), slots(call, call["v"]))
    for form in (RULE.recurrent, RULE.chunkwise):
        torch.testing.assert_close(form(**call)[0], expected, rtol=1e-10, atol=1e-10)


def test_the_values_are_a_pass_of_gated_linear_attention() -> None:
    call = inputs()
    weights = torch.einsum("bthk,bthjk->bthj", call["q"], slots(call, call["k"])).softmax(-1)
    expected, state = get_rule("gla").recurrent(weights, call["s"], call["v"], g=call["g"])
    output, got = RULE.chunkwise(**call)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.values, state, rtol=1e-10, atol=1e-10)


def test_with_tied_gates_a_slot_is_a_weighted_mean() -> None:
    """With s = 1 - e^g the weights of a slot and of its start add up to 1: constant values come back as they are."""
    call = inputs()
    call["s"] = 1 - call["g"].exp()
    call["v"] = torch.ones_like(call["v"])
    _, start = RULE.recurrent(**{name: x[:, :1] for name, x in call.items()})
    output, _ = RULE.chunkwise(**call, state=start._replace(values=torch.ones_like(start.values)))
    torch.testing.assert_close(output, torch.ones_like(output), rtol=1e-12, atol=1e-12)


def test_the_gpu_kernel_is_asked_in_its_own_convention(monkeypatch) -> None:
    call = {name: x.bfloat16() if name in "qkv" else x.float() for name, x in inputs().items()}
    _, state = RULE.recurrent(**call)

    def kernel(module, function, q, k, v, initial, cu_seqlens, **gates):
        assert (module, function) == ("gsa", "chunk_gsa")
        assert gates["s"].dtype == torch.bfloat16
        assert gates["g"].dtype == torch.float32
        assert [x.shape for x in initial] == [(B, H, K, J), (B, H, J, V)]
        return v, tuple(initial)

    monkeypatch.setattr(gsa.fla, "call", kernel)
    gates = {"s": call["s"], "g": call["g"]}
    output, final = RULE.fla_form.call(call["q"], call["k"], call["v"], state, None, **gates)
    assert output is call["v"]
    assert final == state
