"""Gates stay in the range their rule declares, and start where their papers let them start."""

import pytest
import torch

from mnemon.layers.gates import BoundedDecay, GateSizes, ProjectedGate, StepSizeDecay
from mnemon.layers.linear_memory import LinearMemory
from mnemon.ops import get_rule, list_rules
from mnemon.ops.declaration import LIMITS, GateSpec

DECAY = GateSpec("g", "key", "log_decay", identity=0.0, meaning="log decay")
SIZES = GateSizes(hidden_size=8, num_heads=3, channels=4, layer_index=2, num_layers=4)


def filled(gate: ProjectedGate) -> ProjectedGate:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter, value in gate.initial_values():
            parameter.copy_(value)
    return gate


@pytest.mark.parametrize("rule", list_rules())
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_stay_in_the_range_of_their_rule(rule: str, size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LinearMemory(8, rule, 2, 4, layer_index=3, num_layers=4).to(dtype)
    x = (size * torch.randn(2, 50, 8)).to(dtype)
    for name, gate in layer.gates.items():
        values = gate(x)
        low, high = LIMITS[get_rule(rule).gate(name).kind]
        assert values.dtype == torch.float32
        assert values.min() >= low
        assert values.max() <= high
        assert values.isfinite().all()


@pytest.mark.parametrize("rule", list_rules())
def test_huge_inputs_give_finite_outputs_and_gradients(rule: str) -> None:
    torch.manual_seed(0)
    layer = LinearMemory(8, rule, 2, 4, layer_index=3, num_layers=4)
    output, _ = layer(1e3 * torch.randn(2, 50, 8))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("kind", "scale", "expected"),
    [("log_decay", 1.0, -0.6931472 / 16), ("unit", 0.4, 0.2), ("positive", 0.4, 0.4 * 0.6931472), ("real", 0.4, 0.0)],
)
def test_a_gate_without_a_convention_follows_its_declaration(kind: str, scale: float, expected: float) -> None:
    gate = filled(ProjectedGate(GateSpec("x", "head", kind, 0.0, "a gate", scale), SIZES._replace(channels=None)))
    values = gate(torch.zeros(1, 2, 8))
    torch.testing.assert_close(values, torch.full((1, 2, 3), expected))


def test_step_sizes_and_rates_start_where_mamba2s_do() -> None:
    gate = filled(StepSizeDecay(DECAY, SIZES._replace(num_heads=200)))
    step = gate.step_size(torch.zeros(1, 1, 8))
    assert 1e-3 <= step.min() < 2e-3
    assert 0.05 < step.max() <= 0.1 + 1e-6
    torch.testing.assert_close(gate(torch.zeros(1, 1, 8)), -step * gate.log_rate.exp()[:, None])
    assert gate.log_rate.exp().min() >= 1
    assert gate.log_rate.exp().max() <= 16


def test_a_bounded_decay_never_forgets_faster_than_its_bound() -> None:
    gate = filled(BoundedDecay(DECAY, SIZES))
    kept = gate(1e3 * torch.randn(1, 200, 8)).exp()
    torch.testing.assert_close(kept.min(), torch.tensor(0.5))
    assert kept.max() == 1
    assert filled(BoundedDecay(DECAY, SIZES._replace(layer_index=0)))(1e3 * torch.randn(1, 200, 8)).exp().min() < 0.01
