"""Random checkpoints in the published formats, and what they compute, token by token and independent of the library."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]

# Widths that all differ, so that no two can be mistaken for each other.
SIZES: dict[str, Any] = {
    "hidden_size": 20, "num_heads": 2, "head_dim": 6, "expand_v": 1.5, "num_hidden_layers": 2, "vocab_size": 40,
    "intermediate_size": 28, "conv_size": 4, "norm_eps": 1e-3, "hidden_act": "swish", "tie_word_embeddings": False,
    "use_short_conv": True, "attn": None, "attn_mode": "chunk", "max_position_embeddings": 512,
    "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "use_cache": True,
}  # fmt: skip
MOM: dict[str, Any] = SIZES | {
    "model_type": "mom", "architectures": ["MomForCausalLM"], "num_memories": 3, "topk": 2, "capacity": 1.0,
    "aux_loss_scale": 0.02, "shared_mem": True, "single_kv_proj": False, "use_output_gate": True,
    "mom_backend": "gated_deltanet", "attnres_block_size": None, "fuse_norm": True, "fuse_swiglu": True,
}  # fmt: skip
RELEASED: dict[str, Any] = SIZES | {
    "model_type": "mom_gated_deltanet", "num_experts": 3, "topk": 2, "capacity": 1.0, "aux_loss_scale": 0.02,
    "shared_mem": True, "single_expert": False, "use_gate": True, "norm_first": False, "use_layer_wise_balance": True,
}  # fmt: skip
SINGLE: dict[str, Any] = SIZES | {
    "model_type": "gated_deltanet", "use_gate": True, "allow_neg_eigval": False, "num_v_heads": None,
}  # fmt: skip


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a published checkpoint."""
    d, heads, width = config["hidden_size"], config["num_heads"], config["intermediate_size"]
    keys = heads * config["head_dim"]
    head_v = int(config["head_dim"] * config["expand_v"])
    values = heads * head_v
    single = config["model_type"] == "gated_deltanet"
    memories = config.get("num_memories", config.get("num_experts"))
    one_projection = config.get("single_kv_proj", config.get("single_expert"))
    table: dict[str, tuple[int, ...]] = {
        "model.embeddings.weight": (config["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    if not config["tie_word_embeddings"]:
        table["lm_head.weight"] = (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        block, attn = f"model.layers.{layer}", f"model.layers.{layer}.attn"
        table |= {f"{block}.attn_norm.weight": (d,), f"{block}.mlp_norm.weight": (d,)}
        table |= {f"{attn}.q_proj.weight": (keys, d), f"{attn}.g_proj.weight": (values, d)}
        table |= {f"{attn}.A_log": (heads,), f"{attn}.dt_bias": (heads,)}
        table |= {f"{attn}.o_norm.weight": (head_v,), f"{attn}.o_proj.weight": (d, values)}
        projections = {"k": (keys, d), "v": (values, d), "b": (heads, d), "a": (heads, d)}
        for letter, shape in projections.items():
            if single:
                table[f"{attn}.{letter}_proj.weight"] = shape
                continue
            if not one_projection:
                table |= {f"{attn}.{letter}_proj.{number}.weight": shape for number in range(memories)}
            if one_projection or config["shared_mem"]:
                table[f"{attn}.shared_{letter}.weight"] = shape
        if not single:
            table[f"{attn}.gate.weight"] = (memories, d)
        if config["use_short_conv"]:
            for stream, channels in (("q", keys), ("k", keys), ("v", values)):
                table[f"{attn}.{stream}_conv1d.weight"] = (channels, 1, config["conv_size"])
        table[f"{block}.mlp.down_proj.weight"] = (d, width)
        if config["model_type"] == "mom_gated_deltanet":
            table |= {f"{block}.mlp.gate_proj.weight": (2 * width, d), f"{attn}.D": (heads,)}
        else:
            table |= {f"{block}.mlp.gate_proj.weight": (width, d), f"{block}.mlp.up_proj.weight": (width, d)}
    return table


def random_weights(config: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Weights:
    """Return random weights of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(config).items():
        value = torch.randn(shape, dtype=torch.float64, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * value
        elif len(shape) == 2:
            value = value / shape[1] ** 0.5
        weights[name] = (0.5 * value if len(shape) == 1 else value).to(dtype)
    return weights


def save(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    """Write a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(config: dict[str, Any], weights: Weights, ids: list[int]) -> Tensor:
    """Return what the published model computes for one text, [T, vocabulary]."""
    eps = config["norm_eps"]
    h = weights["model.embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        h = h + mixer(config, weights, f"{block}.attn", rms_norm(h, weights[f"{block}.attn_norm.weight"], eps))
        h = h + feed_forward(config, weights, f"{block}.mlp", rms_norm(h, weights[f"{block}.mlp_norm.weight"], eps))
    head = weights.get("lm_head.weight", weights["model.embeddings.weight"])
    return rms_norm(h, weights["model.norm.weight"], eps) @ head.T


def feed_forward(config: dict[str, Any], weights: Weights, name: str, x: Tensor) -> Tensor:
    """Return the gated feed-forward; the released models keep its first two matrices as one."""
    if config["model_type"] == "mom_gated_deltanet":
        gate, up = (x @ weights[f"{name}.gate_proj.weight"].T).chunk(2, dim=-1)
    else:
        gate, up = x @ weights[f"{name}.gate_proj.weight"].T, x @ weights[f"{name}.up_proj.weight"].T
    return (F.silu(gate) * up) @ weights[f"{name}.down_proj.weight"].T


def mixer(config: dict[str, Any], weights: Weights, name: str, x: Tensor) -> Tensor:
    """Return what the memories of a layer add for hidden states [T, D]."""
    heads, values = config["num_heads"], int(config["head_dim"] * config["expand_v"])
    mixed = x.new_zeros(len(x), heads, values)
    if config["model_type"] == "gated_deltanet":
        mixed = one_memory(config, weights, name, x, [f"{name}.{letter}_proj.weight" for letter in "kvba"])
    else:
        one_projection = config.get("single_kv_proj", config.get("single_expert"))
        shared = [f"{name}.shared_{letter}.weight" for letter in "kvba"]
        scores = (x @ weights[f"{name}.gate.weight"].T).softmax(dim=-1)
        best, chosen = scores.topk(config["topk"], dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        for number in range(scores.shape[1]):
            own = [f"{name}.{letter}_proj.{number}.weight" for letter in "kvba"]
            tokens = [t for t in range(len(x)) if number in chosen[t]]
            answers = one_memory(config, weights, name, x[tokens], shared if one_projection else own)
            for place, token in enumerate(tokens):
                rank = chosen[token].tolist().index(number)
                mixed[token] = mixed[token] + best[token, rank] * answers[place]
        if config["shared_mem"]:
            mixed = mixed + one_memory(config, weights, name, x, shared)
    normed = rms_norm(mixed, weights[f"{name}.o_norm.weight"], config["norm_eps"])
    gate = F.silu(x @ weights[f"{name}.g_proj.weight"].T).view_as(normed)
    return (normed * gate).flatten(1) @ weights[f"{name}.o_proj.weight"].T


def one_memory(config: dict[str, Any], weights: Weights, name: str, x: Tensor, projections: list[str]) -> Tensor:
    """Return what one memory answers to the tokens that reach it, [N, H, V]."""
    heads, key_dim = config["num_heads"], config["head_dim"]
    value_dim = int(key_dim * config["expand_v"])
    k_name, v_name, b_name, a_name = projections
    streams = {}
    for stream, projection in (("q", f"{name}.q_proj.weight"), ("k", k_name), ("v", v_name)):
        rows = x @ weights[projection].T
        if config["use_short_conv"]:
            kernel = weights[f"{name}.{stream}_conv1d.weight"]
            padded = F.pad(rows.T, (kernel.shape[-1] - 1, 0))[None]
            rows = F.conv1d(padded, kernel, groups=len(kernel))[0].T if len(rows) else rows
        streams[stream] = F.silu(rows).view(len(x), heads, value_dim if stream == "v" else key_dim)
    q, k = (s / (s.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt() for s in (streams["q"], streams["k"]))
    beta = (x @ weights[b_name].T).sigmoid()
    step = F.softplus(x @ weights[a_name].T + weights[f"{name}.dt_bias"])
    decay = (-weights[f"{name}.A_log"].exp() * step).exp()
    answers = x.new_zeros(len(x), heads, value_dim)
    for head in range(heads):
        memory = x.new_zeros(key_dim, value_dim)
        for t in range(len(x)):
            memory = decay[t, head] * memory
            error = streams["v"][t, head] - k[t, head] @ memory
            memory = memory + torch.outer(k[t, head], beta[t, head] * error)
            answers[t, head] = (q[t, head] / key_dim**0.5) @ memory
    return answers


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean x^2 + eps), times a weight."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight
