"""One memory of one update rule as a layer: from hidden states to hidden states, with the state as a value.

    q, k, v = activation(convolution(x W_q, x W_k, x W_v));   gates from x;   o = rule(q, k, v, gates)
    y = (norm(o) * gate(x)) W_o

The layer is the same for every registered rule; where the published layers differ is in `mnemon.layers.conventions`.
Nothing that changes during a forward pass lives on the module: the tail of the convolution, the rule's state and the
position come in and go out as a `LinearMemoryState`.

Source: the layers published with the rules (docs/linear-memory-layer.md names them and every departure).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemon.errors import ConfigError, ShapeError, StateError
from mnemon.layers.conventions import conventions
from mnemon.layers.convolution import ShortConvolution
from mnemon.layers.gates import Gate, GateSizes, InitialValues, ProjectedGate, Projection, StepSizeDecay, linear_values
from mnemon.ops import get_rule
from mnemon.ops.declaration import Dimensions
from mnemon.ops.forms import FORMS
from mnemon.ops.masking import take, valid_first
from mnemon.ops.state import state_dtype
from mnemon.ops.validation import check_settings

_NORM_EPS = 1e-5
_UNIT_EPS = 1e-6
_ROTARY_BASE = 10000.0
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "elu_plus_one": lambda x: F.elu(x) + 1,
}


class LinearMemoryState(NamedTuple):
    """What a layer knows of the tokens so far; a value, never changed in place.

    Attributes:
        tail: the last tokens the convolution still needs, [B, conv_size - 1, channels], in the dtype of the model.
        memory: state of the rule, float32 (float64 in float64 models).
        position: tokens read so far, [B] int64.
    """

    tail: Tensor
    memory: Any
    position: Tensor


class LinearMemory(nn.Module):
    """A memory of one update rule.

    Args:
        hidden_size: model width D.
        rule: name of a registered rule (`mnemon.ops.list_rules`).
        num_heads: heads H.
        head_dim: key width K per head.
        value_dim: value width V per head; None = `head_dim`.
        layer_index: number of this layer, from 0; Lightning's decay and HGRN2's bound depend on the depth.
        num_layers: layers of the model.
        conv_size: tokens the short convolution sees, 0 = no convolution.
        num_slots: slots J of a rule with slots; None = `head_dim`.
        form: form of the rule that runs, "auto" for the fastest.
        settings: hyper-parameters of the rule.

    Raises:
        ConfigError: if a size is impossible, or the rule, the form or a setting is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        rule: str,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
        conv_size: int = 4,
        num_slots: int | None = None,
        form: str = "auto",
        **settings: int | float | str,
    ) -> None:
        super().__init__()
        self.rule = get_rule(rule)
        self.settings = check_settings(self.rule, settings)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.num_slots = head_dim if num_slots is None else num_slots
        self.form = form
        self.conventions = do = conventions(self.rule, head_dim, **self.settings)
        self.hidden_size = hidden_size
        self._check_sizes(layer_index, num_layers, conv_size)

        keys, values = head_dim if do.shared_qk else num_heads * head_dim, num_heads * self.value_dim
        self.q_proj = Projection(hidden_size, keys, bias=False)
        self.k_proj = None if do.keys_from else Projection(hidden_size, keys, bias=False)
        self.v_proj = Projection(hidden_size, values, bias=False)
        self.widths = [linear.out_features for linear in (self.q_proj, self.k_proj, self.v_proj) if linear is not None]
        self.conv = ShortConvolution(sum(self.widths), conv_size, bias=do.conv_bias) if conv_size else None
        channels = {"head": None, "key": head_dim, "value": self.value_dim, "slot": self.num_slots}
        self.gates = nn.ModuleDict(
            {
                spec.name: do.gates.get(spec.name, ProjectedGate)(
                    spec, GateSizes(hidden_size, num_heads, channels[spec.per], layer_index, num_layers)
                )
                for spec in self.rule.gates
                if spec.name not in do.complements
            }
        )
        sizes = {"H": num_heads, "K": head_dim, "V": self.value_dim, "J": self.num_slots}
        self.weights = nn.ParameterDict(
            {spec.name: nn.Parameter(torch.empty([sizes[axis] for axis in spec.axes])) for spec in self.rule.parameters}
        )
        self.start = nn.Parameter(torch.empty(self._first_memory().shape)) if do.learned_start else None
        self.skip = nn.Parameter(torch.empty(num_heads)) if do.skip else None
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim if do.output_norm == "head" else values))
        self.norm_bias = nn.Parameter(torch.empty(values)) if do.output_norm == "layer" else None
        self.output_gate = Projection(hidden_size, values, bias=False) if do.output_gate else None
        self.o_proj = Projection(values, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        with torch.no_grad():
            for parameter, value in self.initial_values():
                parameter.copy_(value)

    def initial_values(self) -> InitialValues:
        """Return every parameter with its initial value; a model's `_init_weights` copies them in.

        Projections are normal with standard deviation 1/sqrt(fan in), so that what a layer adds to the residual stream
        is of the size of its normalised output, whatever the widths and the depth.
        """
        values: InitialValues = []
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.output_gate, self.o_proj):
            values += [] if linear is None else linear_values(linear)
        values += [] if self.conv is None else self.conv.initial_values()
        for gate in self.gates.values():
            assert isinstance(gate, Gate)
            values += gate.initial_values()
        for spec in self.rule.parameters:
            weight = self.weights[spec.name]
            values.append((weight, torch.full_like(weight, spec.initial)))
        if self.start is not None:
            values.append((self.start, self._first_memory().to(self.start)))
        for parameter, value in ((self.skip, 1.0), (self.norm_weight, 1.0), (self.norm_bias, 0.0)):
            if parameter is not None:
                values.append((parameter, torch.full_like(parameter, value)))
        return values

    def initial_state(self, batch_size: int, like: Tensor) -> LinearMemoryState:
        """Return the state before the first token.

        Args:
            batch_size: sequences B.
            like: a tensor of the device and dtype of the hidden states.
        """
        before = 0 if self.conv is None else self.conv.size - 1
        return LinearMemoryState(
            like.new_zeros(batch_size, before, sum(self.widths)),
            self._initial_memory(batch_size, state_dtype(like.dtype), like.device),
            torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: LinearMemoryState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LinearMemoryState]:
        """Read tokens into the memory and the memory for every token.

        Args:
            x: hidden states, [B, T, D].
            mask: True where a token counts, [B, T], in any pattern; None = everywhere. Other tokens leave the state
                exactly as it was, and the output there means nothing.
            state: state after the tokens before; None = there were none.
            cu_seqlens: boundaries of packed sequences, [N + 1] integers from 0 to T; needs B = 1, the state has N rows.

        Returns:
            The output [B, T, D] in the dtype of x, and the state after the last token.

        Raises:
            ShapeError: if x, mask or cu_seqlens have the wrong shape.
            StateError: if the state is another layer's or another batch's.
        """
        sequences = self._check_inputs(x, mask, cu_seqlens)
        if state is None:
            state = self.initial_state(sequences, x)
        else:
            self._check_state(state, sequences, x)
        if mask is None:
            return self._run(x, state, None, cu_seqlens)
        # Tokens that count move to the front of their row: then neither the convolution nor a position sees the others.
        order, back = valid_first(mask)
        output, state = self._run(take(x, order), state, take(mask, order), None)
        return take(output, back), state

    def _run(
        self, x: Tensor, state: LinearMemoryState, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearMemoryState]:
        """Compute `forward` for a mask that is only False at the end of rows."""
        do = self.conventions
        lengths = None if mask is None else mask.sum(dim=1)
        streams, tail = self._convolve(x, state.tail, lengths, cu_seqlens)
        gates = {name: gate(x) for name, gate in self.gates.items()}
        gates |= {name: -torch.expm1(gates[source]) for name, source in do.complements.items()}
        q = self._heads(streams[0], do.q_activation, self.head_dim)
        v = self._heads(streams[-1], do.v_activation, self.value_dim)
        if do.keys_from is None:
            k = self._heads(streams[1], do.k_activation, self.head_dim)
        else:
            k = -torch.expm1(gates[do.keys_from]).to(q.dtype)
        place, position = _positions(state.position, x.shape[1], lengths, cu_seqlens)
        if do.rotary:
            q, k = _rotate(q, place), _rotate(k, place)
        if do.qk_norm is not None:
            q, k = (_to_unit(z, 1.0 if do.qk_norm == "l2" else math.sqrt(self.head_dim)) for z in (q, k))
        if do.scale_queries:
            q = q / math.sqrt(self.head_dim)
        written = v
        if do.values_times_step:
            written = (v * self._decay().step_size(x)[..., None]).to(v.dtype)
        weights = {name: weight.to(state_dtype(x.dtype)) for name, weight in self.weights.items()}
        o, memory = self.rule(
            q, k, written, form=self.form, state=state.memory, mask=mask, cu_seqlens=cu_seqlens,
            **gates, **weights, **self.settings,
        )  # fmt: skip
        if self.skip is not None:
            o = o + self.skip.to(o.dtype)[:, None] * v
        return self.o_proj(self._normalise(o, x)), LinearMemoryState(tail, memory, position)

    def _convolve(
        self, x: Tensor, tail: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Project to queries, keys (unless they come from a gate) and values, and convolve them over the tokens."""
        joined = torch.cat([proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj) if proj is not None], dim=-1)
        if self.conv is not None and cu_seqlens is not None:
            joined, tail = self.conv.packed(joined, tail, cu_seqlens)
        elif self.conv is not None:
            joined, tail = self.conv(joined, tail, lengths)
        return joined.split(self.widths, dim=-1), tail

    def _heads(self, x: Tensor, activation: str, width: int) -> Tensor:
        """Apply an activation to [B, T, H d], or [B, T, d] for all heads, and split it into heads, [B, T, H, d]."""
        return _ACTIVATIONS[activation](x).unflatten(-1, (-1, width)).expand(-1, -1, self.num_heads, -1)

    def _normalise(self, o: Tensor, x: Tensor) -> Tensor:
        """Turn the rule's output [B, T, H, V] into what is projected back, [B, T, H V]."""
        do = self.conventions
        o = _ACTIVATIONS[do.output_activation](o)
        factor = None
        if self.output_gate is not None and do.output_gate is not None:
            factor = _ACTIVATIONS[do.output_gate](self.output_gate(x)).view_as(o)
        if factor is not None and do.gate_first:
            o = o * factor
        weight = self.norm_weight.to(o.dtype)
        if do.output_norm == "head":
            o = F.rms_norm(o, o.shape[-1:], weight, _NORM_EPS)
        elif self.norm_bias is None:
            o = F.rms_norm(o.flatten(-2), weight.shape, weight, _NORM_EPS).view_as(o)
        else:
            o = F.layer_norm(o.flatten(-2), weight.shape, weight, self.norm_bias.to(o.dtype), _NORM_EPS).view_as(o)
        if factor is not None and not do.gate_first:
            o = o * factor
        return o.flatten(-2)

    def _check_sizes(self, layer_index: int, num_layers: int, conv_size: int) -> None:
        sizes = {
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "num_slots": self.num_slots,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} must be at least 1, got {size}")
        if self.form not in FORMS:
            raise ConfigError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if conv_size < 0:
            raise ConfigError(f"conv_size must be at least 0 (no convolution), got {conv_size}")
        if not 0 <= layer_index < num_layers:
            raise ConfigError(f"layer_index must be between 0 and num_layers - 1 = {num_layers - 1}, got {layer_index}")
        if self.rule.equal_widths and self.value_dim != self.head_dim:
            raise ConfigError(
                f"{self.rule.name} needs value_dim = head_dim = {self.head_dim}, got {self.value_dim}; leave it out"
            )
        if self.conventions.rotary and self.head_dim % 2:
            raise ConfigError(f"{self.rule.name} rotates pairs of channels: head_dim must be even, got {self.head_dim}")

    def _check_inputs(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
        """Check the inputs and return the number of sequences."""
        if x.ndim != 3 or x.shape[-1] != self.hidden_size:
            raise ShapeError(f"expected hidden states [B, T, {self.hidden_size}], got {list(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ShapeError(f"mask must be bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
        if cu_seqlens is None:
            return x.shape[0]
        if mask is not None:
            raise ShapeError("mask and cu_seqlens exclude each other; pack only the tokens that count")
        if x.shape[0] != 1 or cu_seqlens.ndim != 1:
            raise ShapeError(f"cu_seqlens [N + 1] needs a batch of 1, got {list(cu_seqlens.shape)} and {x.shape[0]}")
        return len(cu_seqlens) - 1

    def _check_state(self, state: LinearMemoryState, sequences: int, x: Tensor) -> None:
        """Check what is the layer's own; the rule checks its part."""
        if not isinstance(state, LinearMemoryState):
            raise StateError(f"the state must be a LinearMemoryState, got a {type(state).__name__}")
        tail = (sequences, 0 if self.conv is None else self.conv.size - 1, sum(self.widths))
        if state.tail.shape != tail or state.tail.dtype != x.dtype:
            raise StateError(
                f"the state's tail must be {x.dtype} {list(tail)} for these inputs, got {state.tail.dtype} "
                f"{list(state.tail.shape)}; it belongs to another layer, batch or precision"
            )

    def _decay(self) -> StepSizeDecay:
        gate = self.gates["g"]
        assert isinstance(gate, StepSizeDecay)
        return gate

    def _first_memory(self) -> Tensor:
        """Return what the learned part of the rule's state starts from, without the batch."""
        dimensions = Dimensions(1, self.num_heads, self.head_dim, self.value_dim, self.num_slots)
        weights = {name: torch.ones(weight.shape, device="cpu") for name, weight in self.weights.items()}
        state = self.rule.initial_state(dimensions, torch.float32, "cpu", **weights, **self.settings)
        memory: Tensor = getattr(state, self.conventions.learned_start[0])[0]
        return memory

    def _initial_memory(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Return the rule's state before the first token, with what the layer has learned about it."""
        dimensions = Dimensions(batch_size, self.num_heads, self.head_dim, self.value_dim, self.num_slots)
        weights = {name: weight.to(dtype) for name, weight in self.weights.items()}
        memory = self.rule.initial_state(dimensions, dtype, device, **weights, **self.settings)
        if self.start is None:
            return memory
        start = self.start.to(dtype).expand(batch_size, *self.start.shape)
        # The anchor of a mini-batch of one token has no rows.
        names = self.conventions.learned_start
        return memory._replace(**{name: start[:, :, : getattr(memory, name).shape[2]] for name in names})


def _to_unit(x: Tensor, norm: float) -> Tensor:
    """Scale the last dimension to a length, in float32 at least."""
    wide = x.to(state_dtype(x.dtype))
    return (wide * (norm * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + _UNIT_EPS))).to(x.dtype)


def _positions(before: Tensor, tokens: int, lengths: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return every token's position in its sequence [B, T], and the tokens read after the call [B]."""
    column = torch.arange(tokens, device=before.device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), column, right=True)
        return (column + (before - cu_seqlens[:-1])[sequence])[None], before + cu_seqlens.diff()
    return before[:, None] + column, before + (tokens if lengths is None else lengths)


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate pairs of channels of [B, T, H, K] by angles proportional to the positions [B, T].

    Source:
        RoFormer, arXiv:2104.09864, section 3.2, channel i paired with channel i + K/2.
    """
    half = x.shape[-1] // 2
    # Angles in float64: in float32 an angle of a million radians is off by several hundredths.
    frequency = _ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = positions[..., None, None] * frequency
    cosine, sine = (f(angle).to(state_dtype(x.dtype)) for f in (torch.cos, torch.sin))
    first, second = x.to(cosine.dtype).split(half, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
