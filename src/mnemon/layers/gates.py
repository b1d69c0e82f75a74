"""Gates: what turns a token's hidden state into the values a rule takes by keyword, each in its declared range.

A `GateSpec` says what a gate must be; a gate module here says how a layer makes it. Gates are computed in float32
(float64 in float64 models) whatever the model runs in: a decay near 1 that is taken a thousand times does not survive
bfloat16.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemon.layers.projection import AnyProjection, GroupedProjection, Groups, InitialValues, Projection
from mnemon.ops.declaration import GateSpec, Range
from mnemon.ops.state import state_dtype

_SHORTEST_STEP, _LONGEST_STEP = 1e-3, 0.1  # initial step sizes of Mamba2, log-uniform
_SMALLEST_RATE, _LARGEST_RATE = 1.0, 16.0  # initial decay rates of Mamba2, uniform
_HIGHEST_BOUND = 1 - 1e-4

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log_sigmoid": F.logsigmoid,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "identity": lambda x: x,
}
_FUNCTION_OF_RANGE: dict[Range, str] = {
    "log_decay": "log_sigmoid",
    "unit": "sigmoid",
    "positive": "softplus",
    "real": "identity",
}


class GateSizes(NamedTuple):
    """What a gate has to fit.

    Attributes:
        hidden_size: model width D.
        num_heads: heads H.
        channels: values per head; None is one, without a dimension of its own.
        layer_index: number of the layer, from 0.
        num_layers: layers of the model.
        num_memories: memories with a projection of their own; None = one projection for all tokens.
    """

    hidden_size: int
    num_heads: int
    channels: int | None
    layer_index: int = 0
    num_layers: int = 1
    num_memories: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one token's values."""
        return (self.num_heads,) if self.channels is None else (self.num_heads, self.channels)


class Gate(nn.Module):
    """A module from hidden states [B, T, D] to the values of a gate, [B, T, H] or [B, T, H, channels].

    Called with the hidden states and, if its projection differs between memories, with the `Groups` of the tokens.
    """

    def initial_values(self) -> InitialValues:
        """Return every parameter with its initial value."""
        raise NotImplementedError


class ProjectedGate(Gate):
    """A gate made of a projection of the hidden state: factor * function(x W + b).

    Args:
        spec: what the rule says about the gate.
        sizes: what it has to fit.
        function: "log_sigmoid", "sigmoid", "softplus" or "identity"; None takes the one of the spec's range.
        factor: None takes the spec's scale, and 1/16 for a log decay, so that a memory begins by keeping about 96 % per
            token.
        rank: width between the two maps of a low-rank W; None is one map.
        initial_bias: what b starts at.
        bias: "memory" for a b of every memory with projections of its own, "shared" for one b of all, None for none.
    """

    def __init__(
        self,
        spec: GateSpec,
        sizes: GateSizes,
        *,
        function: str | None = None,
        factor: float | None = None,
        rank: int | None = None,
        initial_bias: float = 0.0,
        bias: str | None = "memory",
    ) -> None:
        super().__init__()
        self.shape = sizes.shape
        self.function = _FUNCTION_OF_RANGE[spec.kind] if function is None else function
        default = 1 / 16 if spec.kind == "log_decay" else spec.scale
        self.factor = default if factor is None else factor
        self.initial_bias = initial_bias
        width = sizes.hidden_size if rank is None else rank
        self.down = None if rank is None else _projection(sizes, sizes.hidden_size, rank, None)
        self.up = _projection(sizes, width, math.prod(self.shape), bias)

    def forward(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Return the gate of hidden states [B, T, D]: [B, T, H] or [B, T, H, channels]."""
        return self.factor * _FUNCTIONS[self.function](self.project(x, groups))

    def project(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Return x W + b in the dtype of gates, in the shape of the gate."""
        if self.down is not None:
            x = self.down.wide(x, groups)
        return self.up.wide(x, groups).unflatten(-1, self.shape)

    def initial_values(self) -> InitialValues:
        """Return every parameter with its initial value."""
        below = [] if self.down is None else self.down.initial_values()
        return [*below, *self.up.initial_values(self.initial_bias)]


class StepSizeDecay(ProjectedGate):
    """A log decay proportional to a step size: g = -exp(A_log) step, step = softplus(x W + b).

    A_log is one number per head. Rates exp(A_log) start uniform between 1 and 16 and steps log-uniform between 0.001
    and 0.1, so that the heads begin with memories of about 1 to 1000 tokens.

    Source:
        Transformers are SSMs, arXiv:2405.21060; the initial values are those of its released layer.
    """

    def __init__(self, spec: GateSpec, sizes: GateSizes, *, rank: int | None = None) -> None:
        # What decides how long a head remembers is the same in all memories; what a token does to it is not.
        super().__init__(spec, sizes, function="softplus", factor=1.0, rank=rank, bias="shared")
        self.log_rate = nn.Parameter(torch.empty(sizes.num_heads))

    def forward(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Return the log decay of hidden states [B, T, D]: [B, T, H] or [B, T, H, channels]."""
        return self.decay(self.step_size(x, groups))

    def decay(self, step: Tensor) -> Tensor:
        """Return the log decay for step sizes."""
        rate = self.log_rate.to(step.dtype).exp()
        return -step * (rate if step.ndim == 3 else rate[:, None])

    def step_size(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Return the step sizes, in the shape of the gate."""
        return F.softplus(self.project(x, groups))

    def initial_values(self) -> InitialValues:
        """Return every parameter with its initial value."""
        span = math.log(_LONGEST_STEP / _SHORTEST_STEP)
        bias = self.up.bias
        assert bias is not None
        step = _SHORTEST_STEP * torch.exp(span * torch.rand_like(bias))
        rate = _SMALLEST_RATE + (_LARGEST_RATE - _SMALLEST_RATE) * torch.rand_like(self.log_rate)
        inverse_softplus = step + torch.log(-torch.expm1(-step))
        values = [(p, value) for p, value in super().initial_values() if p is not bias]
        return [*values, (bias, inverse_softplus), (self.log_rate, rate.log())]


class BoundedDecay(ProjectedGate):
    """A log decay with a learned lower bound: exp(g) = c + (1 - c) sigmoid(x W + b), c = sigmoid(bound).

    The bound of layer l of L starts at l/L, so that deeper layers remember longer; the first layer has none.

    Source:
        HGRN2, arXiv:2404.07904. There the bounds of all layers come from one softmax over the layers, which
        starts at the same values and keeps them in order; here every layer learns its own.
    """

    def __init__(self, spec: GateSpec, sizes: GateSizes) -> None:
        super().__init__(spec, sizes, function="log_sigmoid", factor=1.0)
        self.lowest = min(sizes.layer_index / sizes.num_layers, _HIGHEST_BOUND)
        self.bound = nn.Parameter(torch.empty(self.shape)) if sizes.layer_index > 0 else None

    def forward(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Return the log decay of hidden states [B, T, D]: [B, T, H] or [B, T, H, channels]."""
        free = F.logsigmoid(self.project(x, groups))
        if self.bound is None:
            return free
        bound = self.bound.to(free.dtype)
        # A sum of two terms that add up to at most 1, in logarithms; rounding may put it above 0.
        return torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + free).clamp(max=0.0)

    def initial_values(self) -> InitialValues:
        """Return every parameter with its initial value."""
        values = super().initial_values()
        if self.bound is not None:
            values.append((self.bound, torch.full_like(self.bound, math.log(self.lowest / (1 - self.lowest)))))
        return values


class ConstantDecay(Gate):
    """A log decay that depends on the head alone.

    Args:
        sizes: what it has to fit.
        function: log decays of the heads 0 ... H-1, given as a tensor [H].
    """

    def __init__(self, sizes: GateSizes, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.function = function

    def forward(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Return the log decay for hidden states [B, T, D]: [B, T, H]."""
        heads = torch.arange(self.num_heads, dtype=state_dtype(x.dtype), device=x.device)
        return self.function(heads).expand(*x.shape[:2], -1)

    def initial_values(self) -> InitialValues:
        """Return nothing: there is nothing to learn."""
        return []


def _projection(sizes: GateSizes, width: int, out: int, bias: str | None) -> AnyProjection:
    if sizes.num_memories is None:
        return Projection(width, out, bias=bias is not None)
    return GroupedProjection(sizes.num_memories, width, out, bias)
