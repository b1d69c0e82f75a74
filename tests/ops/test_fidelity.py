"""Agreement with Hugging Face's own PyTorch versions of three rules, which scale queries by K^-1/2."""

import pytest
import torch
from torch.nn import functional as F

from mnemon.ops import get_rule

FORMS = ("recurrent", "chunkwise")
TOKENS = 100


def assert_close(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Compare in float32, in which the references compute."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gated_delta_net_is_that_of_qwen3_next(form: str) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    rule = get_rule("gated_delta_net")
    call = rule.random_inputs(2, TOKENS, 3, 16, 12)
    start = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(1))
    q, k, v = (call.pop(name) for name in "qkv")
    theirs = torch_chunk_gated_delta_rule(q * 4, k, v, **call, initial_state=start, output_final_state=True)
    assert_close(rule(q, k, v, **call, state=start, form=form), theirs)


@pytest.mark.parametrize("form", FORMS)
def test_kda_is_that_of_kimi_linear(form: str) -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention

    rule = get_rule("kda")
    call = rule.random_inputs(2, TOKENS, 3, 16, 12)
    start = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(1))
    q, k, v = (call.pop(name) for name in "qkv")
    theirs = recurrent_kimi_delta_attention(q * 4, k, v, **call, initial_state=start, output_final_state=True)
    assert_close(rule(q, k, v, **call, state=start, form=form), theirs)


@pytest.mark.parametrize("form", FORMS)
def test_mamba2_is_that_of_transformers(form: str) -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    generator = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(2, TOKENS, 3, width, generator=generator) for width in (12, 16, 16))
    dt = F.softplus(torch.randn(2, TOKENS, 3, generator=generator))
    a = -torch.rand(3, generator=generator)
    start = torch.randn(2, 3, 12, 16, generator=generator)  # theirs has values first
    theirs = mamba2_chunk_scan(x, dt, a, b, c, chunk_size=32, initial_states=start, return_final_states=True)
    ours = get_rule("mamba2")(c, b, x * dt[..., None], g=a * dt, state=start.mT.contiguous(), form=form)
    assert_close(ours, (theirs[0], theirs[1].mT))
