"""What the published layer of each update rule does around its recurrence, as data.

The recurrences are in `mnemon.ops`; scaling, normalisation, activations, gates and norms are the layer's, and papers
differ in them. A rule without an entry here, such as one of another package, gets conventions from its declaration.
`docs/linear-memory-layer.md` has the same as a table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from mnemon.layers.gates import BoundedDecay, ConstantDecay, Gate, GateSizes, ProjectedGate, StepSizeDecay
from mnemon.layers.head_inputs import Activation, Norm
from mnemon.ops import UpdateRule
from mnemon.ops.declaration import GateSpec

GateMaker = Callable[[GateSpec, GateSizes], Gate]


@dataclass(frozen=True)
class Conventions:
    """What a layer does around a rule.

    Attributes:
        q_activation: function of the queries, after the convolution.
        k_activation: function of the keys, after the convolution.
        v_activation: function of the values, after the convolution.
        shared_qk: one query and one key for all heads.
        conv_bias: whether the convolution has a bias.
        rotary: rotate queries and keys by their position in the sequence.
        qk_norm: "l2" for unit queries and keys, "rms" for queries and keys of norm sqrt(K).
        scale_queries: multiply queries by K^-1/2.
        keys_from: log decay g from which the keys are formed, k = 1 - exp(g), instead of projected.
        complements: gates formed from a log decay g, by name: 1 - exp(g).
        gates: makers of the gates; a gate that is not here is a `ProjectedGate`.
        values_times_step: multiply the values by the step size of the decay.
        skip: add the values to the output, times one learned number per head.
        learned_start: tensors of the state whose first value the layer learns.
        output_activation: function of the output, before its norm.
        output_norm: "head" for an RMS norm of each head, "width" for one over all heads, "layer" for a LayerNorm.
        output_gate: function of a projection of the hidden state that the output is multiplied by; None = no gate.
        gate_first: multiply by the gate before the norm, not after it.
    """

    q_activation: Activation = "silu"
    k_activation: Activation = "silu"
    v_activation: Activation = "silu"
    shared_qk: bool = False
    conv_bias: bool = False
    rotary: bool = False
    qk_norm: Norm | None = None
    scale_queries: bool = True
    keys_from: str | None = None
    complements: Mapping[str, str] = field(default_factory=dict)
    gates: Mapping[str, GateMaker] = field(default_factory=dict)
    values_times_step: bool = False
    skip: bool = False
    learned_start: tuple[str, ...] = ()
    output_activation: Literal["identity", "silu"] = "identity"
    output_norm: Literal["head", "width", "layer"] = "head"
    output_gate: Literal["silu", "sigmoid"] | None = "silu"
    gate_first: bool = False


def _low_rank(rank: int) -> GateMaker:
    return lambda spec, sizes: ProjectedGate(spec, sizes, rank=rank)


def _write_strength(spec: GateSpec, sizes: GateSizes) -> Gate:
    return ProjectedGate(spec, sizes, bias=None)


def _slot_decay(spec: GateSpec, sizes: GateSizes) -> Gate:
    return ProjectedGate(spec, sizes, factor=1 / 8)


def _retnet_decay(spec: GateSpec, sizes: GateSizes) -> Gate:
    return ConstantDecay(sizes, lambda head: torch.log1p(-torch.exp2(-5 - head)))


def _lightning_decay(spec: GateSpec, sizes: GateSizes) -> Gate:
    slope = 8 / sizes.num_heads * (1 - sizes.layer_index / sizes.num_layers)
    return ConstantDecay(sizes, lambda head: -slope * head)


def _kda_decay(spec: GateSpec, sizes: GateSizes) -> Gate:
    return StepSizeDecay(spec, sizes, rank=sizes.channels)


def _ttt_rate(head_dim: int) -> GateMaker:
    return lambda spec, sizes: ProjectedGate(spec, sizes, function="sigmoid", factor=1 / head_dim)


def _titans_rate(largest: float) -> GateMaker:
    return lambda spec, sizes: ProjectedGate(spec, sizes, factor=largest)


def _slow_decay(spec: GateSpec, sizes: GateSizes) -> Gate:
    # About 1/6000 per token at the start: a network whose weights have decayed to zero cannot learn any more.
    return ProjectedGate(spec, sizes, initial_bias=6.0)


def conventions(rule: UpdateRule, head_dim: int, **settings: int | float | str) -> Conventions:
    """Return what a layer does around a rule.

    Args:
        rule: the rule.
        head_dim: key width K per head.
        settings: the rule's hyper-parameters.

    Returns:
        The conventions of the published layer, or ones derived from the declaration of the rule.
    """
    if rule.name == "ttt":
        return Conventions(
            qk_norm="rms",
            scale_queries=False,
            gates={"lr": _ttt_rate(head_dim)},
            learned_start=("memory", "anchor"),
            output_norm="layer",
            output_gate=None,
        )
    if rule.name == "titans" and settings["memory"] == "mlp":
        return Conventions(
            qk_norm="l2",
            scale_queries=False,
            gates={"lr": _titans_rate(0.1), "g": _slow_decay},  # at rates of 1/2 it diverges
            learned_start=("memory", "anchor"),
        )
    derived = Conventions(qk_norm="l2" if rule.unit_keys else None)
    return _PUBLISHED.get(rule.name, derived)


_PUBLISHED: Mapping[str, Conventions] = {
    "linear_attention": Conventions(
        q_activation="elu_plus_one", k_activation="elu_plus_one", v_activation="identity", output_gate=None
    ),
    "lightning": Conventions(gates={"g": _lightning_decay}, output_norm="width", output_gate="sigmoid"),
    "retnet": Conventions(
        q_activation="identity",
        k_activation="identity",
        v_activation="identity",
        rotary=True,
        gates={"g": _retnet_decay},
    ),
    "mamba2": Conventions(
        shared_qk=True,
        conv_bias=True,
        scale_queries=False,
        gates={"g": StepSizeDecay},
        values_times_step=True,
        skip=True,
        output_norm="width",
        gate_first=True,
    ),
    "gla": Conventions(
        q_activation="identity", k_activation="identity", v_activation="identity", gates={"g": _low_rank(16)}
    ),
    "hgrn2": Conventions(
        v_activation="identity",
        keys_from="g",
        gates={"g": BoundedDecay},
        output_norm="width",
        output_gate=None,
    ),
    "gsa": Conventions(
        scale_queries=False,
        complements={"s": "g"},
        gates={"g": _slot_decay},
        output_activation="silu",
        output_norm="width",
        output_gate=None,
    ),
    # At a rate of 1/2 a step replaces all that the key recalled.
    "titans": Conventions(qk_norm="l2", scale_queries=False, gates={"lr": _titans_rate(0.5)}),
    "delta_net": Conventions(qk_norm="l2", gates={"beta": _write_strength}, output_gate=None),
    "gated_delta_net": Conventions(qk_norm="l2", gates={"g": StepSizeDecay, "beta": _write_strength}),
    "kda": Conventions(qk_norm="l2", gates={"g": _kda_decay, "beta": _write_strength}, output_gate="sigmoid"),
}
