"""Every registered rule as options of a memory layer, inputs for it, and how two states are compared."""

import pytest
import torch

from mnemon.layers.memory_layer import LinearMemoryState
from mnemon.layers.mixture_of_memories import MixtureState
from mnemon.ops import list_rules

D, H, K = 12, 2, 4
CASES = [pytest.param({"rule": name}, id=name) for name in list_rules()]
CASES.append(pytest.param({"rule": "titans", "memory": "mlp", "mini_batch_size": 4, "expansion": 2}, id="titans-mlp"))
every_rule = pytest.mark.parametrize("options", CASES)

LayerState = LinearMemoryState | MixtureState


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(got: LayerState, expected: LayerState) -> None:
    """Compare all tensors of two states up to rounding in float64."""
    for a, b in zip(got.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def assert_identical(got: LayerState, expected: LayerState) -> None:
    """Compare all tensors of two states bit by bit."""
    assert all(torch.equal(a, b) for a, b in zip(got.tensors, expected.tensors, strict=True))
