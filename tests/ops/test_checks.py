"""The checks of a rule's contract find faults: each is shown a rule that breaks it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemon.errors import ConfigError
from mnemon.ops import checks, get_rule
from mnemon.ops.rule import GateSpec, UpdateRule

GOOD = get_rule("mamba2")


def chunkwise(change: Callable[..., Any]) -> UpdateRule:
    """Return mamba2 with a fault in its chunkwise form."""

    def form(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, chunk_size: int, g: Tensor) -> Any:
        assert GOOD.chunkwise_form is not None
        output, state = GOOD.chunkwise_form(q, k, v, state, chunk_size=chunk_size, g=g)
        return change(output, state, q=q, chunk_size=chunk_size)

    return dataclasses.replace(GOOD, chunkwise_form=form)


def future(output: Tensor, state: Tensor, *, q: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return output + 1e-30 * q[:, -1:].sum() * torch.ones_like(output) + output.sum() * 1e-13, state


def step_without_a_gradient(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor) -> tuple[Tensor, Tensor]:
    return GOOD.step(state, q, k.detach(), v, g=g)


def step_that_squares_values(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor) -> tuple[Tensor, Tensor]:
    return GOOD.step(state, q, k, v * v, g=g)


FAULTS = {
    "output": (checks.check_forms_agree, chunkwise(lambda o, s, **_: (o * 1.0001, s))),
    "state": (checks.check_forms_agree, chunkwise(lambda o, s, **_: (o, s * 1.0001))),
    "gradient": (checks.check_forms_agree, chunkwise(lambda o, s, **_: (o.detach() + 0 * o, s))),
    "chunk size": (
        checks.check_chunk_size_changes_nothing,
        chunkwise(lambda o, s, *, chunk_size, **_: (o * (1 + 1e-3 * (chunk_size == 24)), s)),
    ),
    "cut": (checks.check_state_resumes_after_any_cut, chunkwise(lambda o, s, **_: (o, 0 * s))),
    "packed": (checks.check_packed_is_separate, chunkwise(lambda o, s, **_: (o, s.roll(1, 0)))),
    "mask": (
        checks.check_masked_step_changes_nothing,
        dataclasses.replace(GOOD, gates=(dataclasses.replace(GOOD.gates[0], identity=-0.1),)),
    ),
    "causality": (checks.check_causality, chunkwise(future)),
    "rows": (checks.check_rows_are_independent, chunkwise(lambda o, s, **_: (o + 1e-9 * o.sum(0), s))),
    "float32": (checks.check_float32_and_bfloat16, chunkwise(lambda o, s, **_: (o, s.double()))),
    "finite differences": (checks.check_gradients, dataclasses.replace(GOOD, step=step_without_a_gradient)),
    "linearity": (checks.check_declared_linearity, dataclasses.replace(GOOD, step=step_that_squares_values)),
    "size": (checks.check_declared_size, dataclasses.replace(GOOD, state_size="K*V + 1")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str) -> None:
    check, rule = FAULTS[fault]
    check(GOOD, {})
    with pytest.raises(ConfigError, match="mamba2: "):
        check(rule, {})


@pytest.mark.parametrize("kind", ["log_decay", "unit", "positive", "real"])
def test_a_gate_draws_values_of_its_range_and_extremes(kind: Any) -> None:
    gate = GateSpec("x", "head", kind, identity=0.0, meaning="")
    values = gate.sample((1000,), torch.Generator().manual_seed(0), extreme=True)
    assert (values == 0).sum() > 200
    assert (values == (-20 if kind == "log_decay" else 1)).sum() > 200
    mild = gate.sample((1000,), torch.Generator().manual_seed(0))
    assert mild.unique().numel() == 1000
    if kind != "real":
        assert (mild <= 0).all() if kind == "log_decay" else (mild >= 0).all()


def test_random_inputs_are_the_same_at_every_dtype() -> None:
    exact = GOOD.random_inputs(1, 5, 2, 4, 3, dtype=torch.float64)
    rounded = GOOD.random_inputs(1, 5, 2, 4, 3, dtype=torch.bfloat16)
    assert all(torch.equal(exact[name].to(value.dtype), value) for name, value in rounded.items())
    assert not torch.equal(exact["q"], GOOD.random_inputs(1, 5, 2, 4, 3, seed=1, dtype=torch.float64)["q"])
