"""Banks joined for training compute what each of them computes alone, in values and in every gradient."""

import pytest
import torch
from torch import Tensor, nn

from mnemon.layers.joint_banks import JointBanks, can_be_joined
from mnemon.layers.memory_bank import MemoryBank, SegmentRead, WriteStatistics, rms_normalise

B, L, H, J, W, D = 2, 3, 2, 5, 6, 12


def banks(stretch: float = 0.0, width: int = D) -> list[MemoryBank]:
    torch.manual_seed(0)
    made = [MemoryBank(width, J, W, H, retention=0.8, gate_stretch=stretch).double() for _ in range(L)]
    with torch.no_grad():
        for bank in made:
            for parameter, _ in bank.initial_values():
                parameter.copy_(torch.randn_like(parameter))
    return made


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def statistics() -> list[WriteStatistics]:
    parts = [(drawn(B, H, J).detach(), drawn(B, H, J).detach().exp(), drawn(B, H, J, W // H)) for _ in range(L)]
    return [WriteStatistics(peak, total.requires_grad_(), value) for peak, total, value in parts]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    loss = sum((output * torch.linspace(0.5, 2, output.numel()).view(output.shape)).sum() for output in outputs)
    return list(torch.autograd.grad(loss, inputs, allow_unused=True))


def assert_alike(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert any(other is not None for other in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, B], ids=["one bank for all rows", "a bank per row"])
@pytest.mark.parametrize("layers", [1, L], ids=["one bank for all blocks", "a bank per block"])
def test_a_segment_is_opened_for_every_block_as_for_each_alone(layers: int, rows: int) -> None:
    alone = banks()
    bank = drawn(rows, layers, J, W)
    inputs = [bank, *(parameter for block in alone for parameter in block.parameters())]
    joint = JointBanks(alone, torch.float64).open_segment(rms_normalise(bank))
    one_by_one = [
        block.open_segment(rms_normalise(bank[:, order if layers > 1 else 0])) for order, block in enumerate(alone)
    ]
    found, expected = ([part for read in reads for part in read] for reads in (joint, one_by_one))
    assert all(isinstance(read, SegmentRead) for read in joint)
    assert_alike(found, expected)
    assert_alike(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("stretch", [0.0, 0.1])
@pytest.mark.parametrize("is_depth", [True, False], ids=["depth", "layer"])
def test_banks_are_updated_as_each_alone(is_depth: bool, stretch: float) -> None:
    alone, start, gathered = banks(stretch), [drawn(B, J, W) for _ in range(1 if is_depth else L)], statistics()
    inputs = [*start, *(part for block in gathered for part in (block.total, block.value))]
    inputs += [parameter for block in alone for parameter in block.parameters()]

    joint, running, gates = JointBanks(alone, torch.float64), list(start), []
    written = joint.prepare_update(gathered)
    expected_running, expected_gates = list(start), []
    for order, block in enumerate(alone):
        layer = 0 if is_depth else order
        running[layer], found = joint.update(order, running[layer], written)
        expected_running[layer], expected = block.update(expected_running[layer], gathered[order])
        gates += [*found]
        expected_gates += [*expected]
    assert_alike([*running, *gates], [*expected_running, *expected_gates])
    assert_alike(gradients(running, inputs), gradients(expected_running, inputs))
    if stretch:
        assert any(((gate == 0) | (gate == 1)).any() for gate in gates)  # the flat ends were tried


def test_only_compact_banks_that_nobody_has_wrapped_are_joined() -> None:
    assert can_be_joined(banks())
    assert not can_be_joined([])
    assert not can_be_joined(banks(width=W))
    wrapped = banks()
    wrapped[1].read_query = nn.Sequential(wrapped[1].read_query)
    assert not can_be_joined(wrapped)
