"""What rules are to each other, which needs no outside reference."""

import pytest
import torch
from torch.nn import functional as F

from mnemon.ops import UpdateRule, get_rule
from mnemon.ops.rules import lightning, retnet

FORMS = ("recurrent", "chunkwise")


def inputs(rule: UpdateRule, tokens: int = 70) -> dict[str, torch.Tensor]:
    return rule.random_inputs(2, tokens, 3, 8, 5, dtype=torch.float64)


def assert_same(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gla_without_decay_is_linear_attention(form: str) -> None:
    gla = get_rule("gla")
    call = inputs(gla)
    call["g"] = torch.zeros_like(call["g"])
    plain = {name: call[name] for name in "qkv"}
    assert_same(gla(**call, form=form), get_rule("linear_attention")(**plain, form=form))


@pytest.mark.parametrize("name", ["retnet", "lightning", "mamba2"])
@pytest.mark.parametrize("form", FORMS)
def test_a_decay_per_head_is_a_constant_decay_per_channel(name: str, form: str) -> None:
    rule = get_rule(name)
    call = inputs(rule)
    spread = call | {"g": call["g"][..., None].expand_as(call["k"])}
    assert_same(rule(**call, form=form), get_rule("gla")(**spread, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_gated_delta_net_without_decay_is_delta_net(form: str) -> None:
    rule = get_rule("gated_delta_net")
    call = inputs(rule)
    call["g"] = torch.zeros_like(call["g"])
    ungated = {name: value for name, value in call.items() if name != "g"}
    assert_same(rule(**call, form=form), get_rule("delta_net")(**ungated, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_kda_with_equal_channels_is_gated_delta_net(form: str) -> None:
    rule = get_rule("gated_delta_net")
    call = inputs(rule)
    spread = call | {"g": call["g"][..., None].expand_as(call["k"])}
    assert_same(rule(**call, form=form), get_rule("kda")(**spread, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_delta_net_recalls_values_of_orthonormal_keys_exactly(form: str) -> None:
    k = torch.eye(8, dtype=torch.float64)[None, :, None]
    v = torch.randn(1, 8, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule = get_rule("delta_net")
    _, state = rule(k, k, v, beta=torch.ones(1, 8, 1, dtype=torch.float64), form=form)
    recalled, _ = rule(k, k, v, beta=torch.zeros(1, 8, 1, dtype=torch.float64), state=state, form=form)
    assert torch.equal(recalled, v)


@pytest.mark.parametrize("form", FORMS)
def test_delta_net_replaces_what_stood_under_a_key(form: str) -> None:
    k = F.normalize(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), dim=0).expand(1, 2, 1, 3)
    v = torch.tensor([[1.0, 2.0], [5.0, -1.0]], dtype=torch.float64)[None, :, None]
    output, _ = get_rule("delta_net")(k, k, v, beta=torch.ones(1, 2, 1, dtype=torch.float64), form=form)
    torch.testing.assert_close(output, v, rtol=0, atol=1e-14)


def test_retnet_decays_as_the_paper_prints_them() -> None:
    expected = [1 - 2.0 ** (-5 - head) for head in range(4)]
    torch.testing.assert_close(retnet.log_decay(4).exp(), torch.tensor(expected, dtype=torch.float64))


def test_lightning_forgets_less_in_deeper_layers_and_never_in_head_0() -> None:
    first, last = lightning.log_decay(4, 0, 12), lightning.log_decay(4, 11, 12)
    assert first.tolist() == [0.0, -2.0, -4.0, -6.0]
    assert (last[1:] > first[1:]).all()
    assert last[0] == 0
