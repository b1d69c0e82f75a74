"""What every layer around an update rule does, be it one memory or several, in three steps.

    project:   s = (x W_q, x W_k, x W_v);   gates from x
    remember:  q, k, v = activation(convolution(s));   o, state = rule(q, k, v, gates, state)
    output:    y = (norm(o) * gate(x)) W_o

The steps are the same for every registered rule; where the published layers differ is in `mnemon.layers.conventions`.
Nothing that changes during a forward pass lives on the module: the tail of the convolution, the rule's state and the
position come in and go out as a `LinearMemoryState`.

Source: the layers published with the rules (docs/linear-memory-layer.md names them and every departure).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemon.errors import ConfigError, ShapeError
from mnemon.layers.conventions import conventions
from mnemon.layers.convolution import ShortConvolution
from mnemon.layers.gates import Gate, GateSizes, ProjectedGate, StepSizeDecay
from mnemon.layers.head_inputs import head_inputs
from mnemon.layers.projection import AnyProjection, GroupedProjection, Groups, InitialValues, Projection
from mnemon.ops import get_rule
from mnemon.ops.declaration import Dimensions
from mnemon.ops.forms import FORMS
from mnemon.ops.state import leaves, rebuild, state_dtype
from mnemon.ops.validation import check_settings

NORM_EPS = 1e-5
_ROTARY_BASE = 10000.0
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in order."""
        return (self.tail, *leaves(self.memory), self.position)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "LinearMemoryState":
        """Return a state of the same kind made of other tensors, in the order of `tensors`."""
        tail, *memory, position = tensors
        return LinearMemoryState(tail, rebuild(self.memory, memory), position)

    def map(self, function: Callable[[Tensor], Tensor]) -> "LinearMemoryState":
        """Apply a function to every tensor."""
        return self.with_tensors([function(tensor) for tensor in self.tensors])


class MemoryInputs(NamedTuple):
    """What a layer makes of hidden states before it knows which tokens came before.

    Attributes:
        streams: queries, keys (unless they come from a gate) and values side by side, before the convolution,
            [..., channels].
        gates: the gates by name, [..., H] or [..., H, channels].
        step: step sizes that the values are multiplied by, [..., H]; None for rules without.
    """

    streams: Tensor
    gates: dict[str, Tensor]
    step: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "MemoryInputs":
        """Apply a function to every tensor."""
        gates = {name: function(gate) for name, gate in self.gates.items()}
        return MemoryInputs(function(self.streams), gates, None if self.step is None else function(self.step))


class RuleInputs(NamedTuple):
    """What a layer hands its rule for some tokens, and what it carries on beside the rule's state.

    Attributes:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values as they are written, [B, T, H, V].
        keywords: gates, weights and settings of the rule, by keyword.
        skipped: values that are also added to the output, [B, T, H, V], if the layer does that.
        tail: tail of the convolution after the last token.
        position: tokens read by then, [B].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keywords: dict[str, Any]
    skipped: Tensor
    tail: Tensor
    position: Tensor


class MemoryLayer(nn.Module):
    """Projections, convolution, gates, weights, norm and output of a layer around one update rule.

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
        num_projections: sets of projections to keys, values and gates, one per memory; None = one for all tokens.
        norm_eps: what the norm of the output adds to the mean square before its root, above 0.
        output_gate: False leaves out the output gate of a layer that is published with one.
        initial_output: what the output projection's initial weights are multiplied by; 0 = a fresh layer adds nothing
            to the residual stream.
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
        num_projections: int | None = None,
        norm_eps: float = NORM_EPS,
        output_gate: bool = True,
        initial_output: float = 1.0,
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
        if not output_gate:
            self.conventions = do = replace(do, output_gate=None)
        self.hidden_size = hidden_size
        self.norm_eps, self.initial_output = norm_eps, initial_output
        self._check_sizes(layer_index, num_layers, conv_size)

        keys, values = head_dim if do.shared_qk else num_heads * head_dim, num_heads * self.value_dim
        self.q_proj = Projection(hidden_size, keys, bias=False)
        self.k_proj = None if do.keys_from else _projection(hidden_size, keys, num_projections)
        self.v_proj = _projection(hidden_size, values, num_projections)
        self.widths = [keys] * (1 if self.k_proj is None else 2) + [values]
        self.conv = ShortConvolution(sum(self.widths), conv_size, bias=do.conv_bias) if conv_size else None
        channels = {"head": None, "key": head_dim, "value": self.value_dim, "slot": self.num_slots}
        self.gates = nn.ModuleDict(
            {
                spec.name: do.gates.get(spec.name, ProjectedGate)(
                    spec,
                    GateSizes(hidden_size, num_heads, channels[spec.per], layer_index, num_layers, num_projections),
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
        is of the size of its normalised output, whatever the widths and the depth; times `initial_output`.
        """
        values: InitialValues = []
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.output_gate):
            values += [] if linear is None else linear.initial_values()
        values += [(weight, self.initial_output * value) for weight, value in self.o_proj.initial_values()]
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

    @property
    def tail_length(self) -> int:
        """Tokens the convolution still needs of those before."""
        return 0 if self.conv is None else self.conv.size - 1

    def initial_state(self, batch_size: int, like: Tensor) -> LinearMemoryState:
        """Return the state before the first token.

        Args:
            batch_size: sequences B.
            like: a tensor of the device and dtype of the hidden states.
        """
        return LinearMemoryState(
            like.new_zeros(batch_size, self.tail_length, sum(self.widths)),
            self._initial_memory(batch_size, state_dtype(like.dtype), like.device),
            torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    def check_hidden_states(self, x: Tensor, mask: Tensor | None) -> None:
        """Check hidden states [B, T, D] and a mask [B, T].

        Raises:
            ShapeError: if one of them has the wrong shape or dtype.
        """
        if x.ndim != 3 or x.shape[-1] != self.hidden_size:
            raise ShapeError(f"expected hidden states [B, T, {self.hidden_size}], got {list(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ShapeError(f"mask must be bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")

    def project(self, x: Tensor, groups: Groups | None = None, queries: Tensor | None = None) -> MemoryInputs:
        """Compute what depends on single tokens.

        Args:
            x: hidden states, [B, T, D].
            groups: which memory each of the B T tokens goes to, if memories have projections of their own.
            queries: x W_q, where it is known.
        """
        do = self.conventions
        parts = [self.q_proj(x) if queries is None else queries]
        parts += [proj(x, groups) for proj in (self.k_proj, self.v_proj) if proj is not None]
        gates = {name: gate(x, groups) for name, gate in self.gates.items() if name != "g" or not do.values_times_step}
        step = None
        if do.values_times_step:  # the decay and the values share it
            decay = self.gates["g"]
            assert isinstance(decay, StepSizeDecay)
            step = decay.step_size(x, groups)
            gates["g"] = decay.decay(step)
        gates |= {name: -torch.expm1(gates[source]) for name, source in do.complements.items()}
        return MemoryInputs(torch.cat(parts, dim=-1), gates, step)

    def remember(
        self,
        inputs: MemoryInputs,
        state: LinearMemoryState,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LinearMemoryState]:
        """Read tokens into memories and the memories for every token.

        Args:
            inputs: what `project` returned, [B, T, ...].
            state: one row per sequence.
            mask: True where a token counts, [B, T]; False only at the end of rows.
            cu_seqlens: boundaries of packed sequences, [N + 1]; needs B = 1.

        Returns:
            What the memories answered, [B, T, H, V], and the state after the last token.
        """
        call = self.rule_inputs(inputs, state, mask, cu_seqlens)
        o, memory = self.rule(
            call.q, call.k, call.v, form=self.form, state=state.memory, mask=mask, cu_seqlens=cu_seqlens,
            **call.keywords,
        )  # fmt: skip
        if self.skip is not None:
            o = o + self.skip.to(o.dtype)[:, None] * call.skipped
        return o, LinearMemoryState(call.tail, memory, call.position)

    def rule_inputs(
        self,
        inputs: MemoryInputs,
        state: LinearMemoryState,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> RuleInputs:
        """Return what `remember` hands the rule (arguments as there)."""
        do = self.conventions
        lengths = None if mask is None else mask.sum(dim=1)
        streams, tail = self._convolve(inputs.streams, state.tail, lengths, cu_seqlens)
        factor = 1 / math.sqrt(self.head_dim) if do.scale_queries else 1.0
        heads = [x.unflatten(-1, (-1, self.head_dim)) for x in streams[:-1]]
        q = head_inputs(heads[0], do.q_activation, do.qk_norm, factor).expand(-1, -1, self.num_heads, -1)
        v = head_inputs(streams[-1], do.v_activation).unflatten(-1, (-1, self.value_dim))
        if do.keys_from is None:
            k = head_inputs(heads[1], do.k_activation, do.qk_norm).expand(-1, -1, self.num_heads, -1)
        else:
            k = head_inputs(-torch.expm1(inputs.gates[do.keys_from]).to(q.dtype), "identity", do.qk_norm)
        place, position = _positions(state.position, q.shape[1], lengths, cu_seqlens)
        if do.rotary:  # which changes no length
            q, k = _rotate(q, place), _rotate(k, place)
        written = v if inputs.step is None else (v * inputs.step[..., None]).to(v.dtype)
        weights = {name: weight.to(state_dtype(q.dtype)) for name, weight in self.weights.items()}
        keywords = {**inputs.gates, **weights, **self.settings}
        return RuleInputs(q, k, written, keywords, v, tail, position)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Return what a layer adds to the residual stream, [B, T, D], from the memories' answers [B, T, H, V]."""
        y: Tensor = self.o_proj(self._normalise(o, x))
        return y

    def _convolve(
        self, streams: Tensor, tail: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Convolve queries, keys and values over the tokens of each sequence."""
        if self.conv is not None and cu_seqlens is not None:
            streams, tail = self.conv.packed(streams, tail, cu_seqlens)
        elif self.conv is not None:
            streams, tail = self.conv(streams, tail, lengths)
        return streams.split(self.widths, dim=-1), tail

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
            o = F.rms_norm(o, o.shape[-1:], weight, self.norm_eps)
        elif self.norm_bias is None:
            o = F.rms_norm(o.flatten(-2), weight.shape, weight, self.norm_eps).view_as(o)
        else:
            o = F.layer_norm(o.flatten(-2), weight.shape, weight, self.norm_bias.to(o.dtype), self.norm_eps).view_as(o)
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
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be above 0, got {self.norm_eps}")
        if not 0 <= layer_index < num_layers:
            raise ConfigError(f"layer_index must be between 0 and num_layers - 1 = {num_layers - 1}, got {layer_index}")
        if self.rule.equal_widths and self.value_dim != self.head_dim:
            raise ConfigError(
                f"{self.rule.name} needs value_dim = head_dim = {self.head_dim}, got {self.value_dim}; leave it out"
            )
        if self.conventions.rotary and self.head_dim % 2:
            raise ConfigError(f"{self.rule.name} rotates pairs of channels: head_dim must be even, got {self.head_dim}")

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


def _projection(width: int, out: int, num_projections: int | None) -> AnyProjection:
    if num_projections is None:
        return Projection(width, out, bias=False)
    return GroupedProjection(num_projections, width, out)


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
