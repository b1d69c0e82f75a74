"""Memory for long results."""

import pytest
import torch

from mnemon.ops.fresh import fresh


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 2**16])
def test_fresh_memory_keeps_what_is_written(dtype: torch.dtype, tokens: int) -> None:
    shape = torch.Size((2, tokens, 17))
    values = torch.arange(17, dtype=dtype).expand(shape)
    memory = fresh(torch.ones(1, dtype=dtype, requires_grad=True), shape)
    memory.copy_(values)
    assert memory.is_contiguous()
    assert not memory.requires_grad
    assert torch.equal(memory, values)


def test_fresh_memory_is_on_the_device_of_its_model() -> None:
    assert fresh(torch.empty(1, device="meta"), torch.Size((2**12, 2**12))).is_meta
