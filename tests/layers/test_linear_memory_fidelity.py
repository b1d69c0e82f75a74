"""The single-memory layer against the layers of transformers, with their weights."""

import pytest
import torch
from transformers import Mamba2Config, Qwen3NextConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from mnemon.layers.linear_memory import LinearMemory

D, H, K, V, T = 24, 3, 8, 16, 41


def copy(pairs: list[tuple[torch.nn.Parameter | None, torch.Tensor]]) -> None:
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value.reshape(parameter.shape))


def compare(ours: LinearMemory, theirs: torch.nn.Module) -> None:
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = ours(x)[0]
        torch.testing.assert_close(output, theirs.eval()(x), rtol=2e-4, atol=2e-5)
    assert output.square().mean() > 1e-3


def test_gated_delta_net_is_qwen3_nexts() -> None:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=1,
        linear_num_key_heads=H,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    ours = LinearMemory(D, "gated_delta_net", H, K, V)
    q, k, v, gate = theirs.in_proj_qkvz.weight.view(H, 2 * K + 2 * V, D).split([K, K, V, V], dim=1)
    beta, step = theirs.in_proj_ba.weight.view(H, 2, D).unbind(1)
    copy(
        [
            (ours.q_proj.weight, q),
            (ours.k_proj.weight, k),
            (ours.v_proj.weight, v),
            (ours.output_gate.weight, gate),
            (ours.conv.weight, theirs.conv1d.weight),
            (ours.gates["beta"].up.weight, beta),
            (ours.gates["g"].up.weight, step),
            (ours.gates["g"].up.bias, theirs.dt_bias),
            (ours.gates["g"].log_rate, theirs.A_log),
            (ours.norm_weight, theirs.norm.weight),
            (ours.o_proj.weight, theirs.out_proj.weight),
        ]
    )
    compare(ours, theirs)


def test_mamba2_is_transformers() -> None:
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=D,
        num_hidden_layers=1,
        num_heads=H,
        head_dim=V,
        state_size=K,
        expand=H * V // D,
        n_groups=1,
        chunk_size=16,
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=1e-5,
    )
    theirs = Mamba2Mixer(config, 0)
    with torch.no_grad():
        theirs.D.normal_()
    ours = LinearMemory(D, "mamba2", H, K, V)
    gate, v, k, q, step = theirs.in_proj.weight.split([H * V, H * V, K, K, H])
    order = torch.cat([torch.arange(H * V + K, H * V + 2 * K), torch.arange(H * V, H * V + K), torch.arange(H * V)])
    copy(
        [
            (ours.q_proj.weight, q),
            (ours.k_proj.weight, k),
            (ours.v_proj.weight, v),
            (ours.output_gate.weight, gate),
            (ours.conv.weight, theirs.conv1d.weight[order]),
            (ours.conv.bias, theirs.conv1d.bias[order]),
            (ours.gates["g"].up.weight, step),
            (ours.gates["g"].up.bias, theirs.dt_bias),
            (ours.gates["g"].log_rate, theirs.A_log),
            (ours.skip, theirs.D),
            (ours.norm_weight, theirs.norm.weight),
            (ours.o_proj.weight, theirs.out_proj.weight),
        ]
    )
    compare(ours, theirs)


def test_kda_is_kimi_linears() -> None:
    kimi = pytest.importorskip(
        "transformers.models.kimi_linear.modeling_kimi_linear", reason="this version of transformers has no Kimi Linear"
    )
    torch.manual_seed(0)
    config = kimi.KimiLinearConfig(
        hidden_size=D,
        num_hidden_layers=1,
        linear_num_heads=H,
        linear_head_dim=K,
        rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
    )
    theirs = kimi.KimiLinearDeltaAttention(config, 0)
    copy([(theirs.forget_gate.dt_bias, torch.randn(H * K)), (theirs.forget_gate.A_log, torch.rand(H))])
    ours = LinearMemory(D, "kda", H, K)
    copy(
        [
            (ours.q_proj.weight, theirs.q_proj.weight),
            (ours.k_proj.weight, theirs.k_proj.weight),
            (ours.v_proj.weight, theirs.v_proj.weight),
            (ours.conv.weight, theirs.conv1d.weight),
            (ours.gates["beta"].up.weight, theirs.b_proj.weight),
            (ours.gates["g"].down.weight, theirs.forget_gate.f_a_proj.weight),
            (ours.gates["g"].up.weight, theirs.forget_gate.f_b_proj.weight),
            (ours.gates["g"].up.bias, theirs.forget_gate.dt_bias),
            (ours.gates["g"].log_rate, theirs.forget_gate.A_log),
            (ours.output_gate.weight, theirs.g_b_proj.weight @ theirs.g_a_proj.weight),
            (ours.norm_weight, theirs.o_norm.weight),
            (ours.o_proj.weight, theirs.o_proj.weight),
        ]
    )
    compare(ours, theirs)
