"""What an update rule is: its gates, its cost, its forms, as one read-only declaration.

A rule file in `mnemon/ops/rules/` (or another package) writes a memory's recurrence once, as `step`, and declares what
the recurrence needs. Layers, tests, benchmarks and the command line read the declaration; none of them knows a rule by
name. Checking a call lives in `mnemon.ops.validation`, running a form in `mnemon.ops.forms`.

Shapes: `B` batch, `T` tokens, `H` heads, `K` key width per head, `V` value width per head, `J` slots, `C` chunk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mnemon.ops import forms, inputs, masking, validation
from mnemon.ops.declaration import Dimensions, FlaForm, GateSpec, HyperParameter, ParameterSpec, Source, State
from mnemon.ops.formula import evaluate

__all__ = [
    "Dimensions",
    "FlaForm",
    "GateSpec",
    "HyperParameter",
    "ParameterSpec",
    "Source",
    "State",
    "UpdateRule",
]


@dataclass(frozen=True)
class UpdateRule:
    """A recurrence of a linear memory, with everything its users need to know about it.

    Attributes:
        name: name of the rule and of its file.
        equation: the recurrence in one line (S state, k, v, q row vectors, o output).
        source: the paper.
        gates: values per token, by keyword.
        init_state: (dimensions, dtype, device, **parameters and hyper-parameters) -> state before the first token.
        step: (state, q [B,H,K], k [B,H,K], v [B,H,V], **gates without T, **parameters and hyper-parameters) ->
            (o [B,H,V], state). The definition: everything is in the state's dtype, and nothing is changed in place.
        state_size: numbers in the state per head, a formula in K, V, J and the names of numeric hyper-parameters.
        recurrent_flops: floating-point operations per token and head of `step`, a formula like `state_size`.
        chunkwise_flops: the same of the chunkwise form, also in C; empty without one.
        chunkwise_form: (q, k, v, state, *, chunk_size, **as step, with T) -> (o, state), or None. The caller sees to it
            that T is a multiple of `chunk_size` and that everything is in the state's dtype.
        fla_form: the form of flash-linear-attention, or None.
        parameters: weights of the memory, by keyword.
        hyper_parameters: settings, by keyword.
        unit_keys: the rule is only stable for keys of norm 1 at most; the layer has to normalise them.
        chunk_size: tokens per chunk that are fastest on a CPU at widths around 64.
        light_backward: `chunkwise_form` keeps little for its gradient. Long sequences of other rules are computed a
            second time, block by block, in the backward pass.
        equal_widths: keys and values must have the same width, K = V.
        counts_tokens: identity inputs cannot express a masked step (the rule counts tokens, or moves without input).
            Such a `chunkwise_form` takes `mask`: None, or [B, T] that is False at the end of rows only. `step` never
            sees a mask: the scan leaves the state of a masked token as it was.
        linear_tensors: numbers of the state's tensors (`mnemon.ops.state.leaves`) that hold values: with queries, keys,
            gates and all other tensors held, the output and these tensors are linear in the values and in these tensors
            before. Empty = the output is not linear in the values, or nobody has said so.
        linear_settings: values that hyper-parameters must have for that, by name; others do not matter.
    """

    name: str
    equation: str
    source: Source
    gates: tuple[GateSpec, ...]
    init_state: Callable[..., State]
    step: Callable[..., tuple[Tensor, State]]
    state_size: str
    recurrent_flops: str
    chunkwise_flops: str = ""
    chunkwise_form: Callable[..., tuple[Tensor, State]] | None = None
    fla_form: FlaForm | None = None
    parameters: tuple[ParameterSpec, ...] = ()
    hyper_parameters: tuple[HyperParameter, ...] = ()
    unit_keys: bool = False
    light_backward: bool = False
    equal_widths: bool = False
    chunk_size: int = 64
    counts_tokens: bool = False
    linear_tensors: tuple[int, ...] = ()
    linear_settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def forms(self) -> tuple[str, ...]:
        """Names of the forms the rule has, slowest first; "fla" also needs its package and a GPU."""
        fast = (("chunkwise", self.chunkwise_form), ("fla", self.fla_form))
        return ("recurrent", *(name for name, form in fast if form is not None))

    def gate(self, name: str) -> GateSpec:
        """Return the gate of that name."""
        return next(gate for gate in self.gates if gate.name == name)

    def defaults(self) -> dict[str, int | float | str]:
        """Return the hyper-parameters with their default values."""
        return {setting.name: setting.default for setting in self.hyper_parameters}

    def linear_in_values(self, **settings: int | float | str) -> tuple[int, ...]:
        """Return `linear_tensors` if these settings allow it, else ().

        Args:
            settings: hyper-parameters that differ from their defaults.
        """
        given = self.defaults() | settings
        return self.linear_tensors if all(given[n] == value for n, value in self.linear_settings.items()) else ()

    def size(self, formula: str, *, key_dim: int, value_dim: int, slots: int = 0, **others: float) -> int:
        """Evaluate one of the rule's formulas, such as `rule.size(rule.state_size, key_dim=64, value_dim=64)`.

        Args:
            formula: `state_size`, `recurrent_flops` or `chunkwise_flops` of this rule.
            key_dim: key width K per head.
            value_dim: value width V per head.
            slots: slots J, for rules with slots.
            others: `C`, and hyper-parameters that differ from their defaults.

        Returns:
            The number, per head.
        """
        numbers = {name: value for name, value in self.defaults().items() if not isinstance(value, str)}
        return int(evaluate(formula, {"K": key_dim, "V": value_dim, "J": slots, **numbers, **others}))

    def initial_state(
        self, dimensions: Dimensions, dtype: torch.dtype, device: torch.device | str = "cpu", **options: Any
    ) -> State:
        """Build the state before the first token.

        Args:
            dimensions: sizes; every sequence gets a row.
            dtype: float32 or float64.
            device: where.
            options: parameters and hyper-parameters of the rule.

        Returns:
            The state; each of its tensors has the sequences first.
        """
        return self.init_state(dimensions, dtype, device, **(self.defaults() | options))

    def recurrent(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        **gates: Any,
    ) -> tuple[Tensor, State]:
        """Run the definition, one token after another.

        Nothing is scaled or normalised inside: that is the layer's business.

        Args:
            q: queries, [B, T, H, K].
            k: keys, [B, T, H, K].
            v: values, [B, T, H, V].
            state: state before the first token; None is the rule's initial state.
            cu_seqlens: boundaries of packed sequences, [N + 1] integers from 0 to T; needs B = 1, the state has N rows.
            mask: False where a token does not count, [B, T]; the output there means nothing.
            gates: gates, parameters and hyper-parameters by keyword. Tensors are float32, or float64 when v is.

        Returns:
            Output [B, T, H, V] in the dtype of v, and the state after the last token (float32, or float64 when v is).

        Raises:
            ShapeError: if a tensor or gate has the wrong shape, dtype or range, or is missing.
            ConfigError: if a keyword or the value of a hyper-parameter is unknown to the rule.
            StateError: if the state does not fit the rule and the inputs.
        """
        call = validation.check(self, q, k, v, state, cu_seqlens, mask, gates)
        return forms.run_recurrent(self, call)

    def chunkwise(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        chunk_size: int | None = None,
        **gates: Any,
    ) -> tuple[Tensor, State]:
        """Compute the same with matrix products inside chunks; arguments and results are those of `recurrent`.

        Args:
            q: queries, [B, T, H, K].
            k: keys, [B, T, H, K].
            v: values, [B, T, H, V].
            state: as in `recurrent`.
            cu_seqlens: as in `recurrent`.
            mask: as in `recurrent`.
            chunk_size: tokens per chunk; changes the speed, never the answer. None takes the rule's own.
            gates: as in `recurrent`.

        Returns:
            As `recurrent`.

        Raises:
            BackendUnavailable: if the rule has no chunkwise form; else as `recurrent`.
        """
        call = validation.check(self, q, k, v, state, cu_seqlens, mask, gates)
        return forms.run_chunkwise(self, call, chunk_size)

    def fla(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        **gates: Any,
    ) -> tuple[Tensor, State]:
        """Compute the same with the GPU kernels of flash-linear-attention; arguments and results as in `recurrent`.

        Raises:
            BackendUnavailable: if the package, a GPU or a kernel for this rule and these sizes is missing.
        """
        call = validation.check(self, q, k, v, state, cu_seqlens, mask, gates)
        return forms.run_fla(self, call)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        form: str = "auto",
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        **gates: Any,
    ) -> tuple[Tensor, State]:
        """Compute the rule in a form of choice; arguments and results as in `recurrent`.

        Args:
            q: queries, [B, T, H, K].
            k: keys, [B, T, H, K].
            v: values, [B, T, H, V].
            form: "recurrent", "chunkwise", "fla", or "auto" for the fastest that can run here
                (`mnemon.ops.choose_form` says which and why). A form asked for by name is never replaced by another.
            state: as in `recurrent`.
            cu_seqlens: as in `recurrent`.
            mask: as in `recurrent`.
            gates: as in `recurrent`.

        Returns:
            As `recurrent`.

        Raises:
            BackendUnavailable: if the form asked for cannot run here; else as `recurrent`.
        """
        call = validation.check(self, q, k, v, state, cu_seqlens, mask, gates)
        return forms.run(self, call, form)

    def masked(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **gates: Any
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Turn a mask into inputs that leave the state exactly as it was where the mask is False.

        Keys and values become zero there and gates their identity. For a rule that counts tokens the mask itself stays
        among the keywords, because no input could express it.

        Args:
            q: queries, [B, T, H, K].
            k: keys, [B, T, H, K].
            v: values, [B, T, H, V].
            mask: True where a token counts, [B, T].
            gates: the rule's keywords.

        Returns:
            q, k, v and the keywords for any form of the rule.
        """
        return masking.masked(self, q, k, v, mask, gates)

    def random_inputs(
        self,
        batch: int,
        tokens: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        slots: int = 8,
        seed: int = 0,
        extreme: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Draw inputs a call of the rule accepts, for tests and benchmarks.

        Args:
            batch: batch size B.
            tokens: tokens T.
            heads: heads H.
            key_dim: key width K.
            value_dim: value width V.
            slots: slots J, for rules with slots.
            seed: the same seed gives the same values at every dtype and device, up to rounding.
            extreme: let gates reach both ends of their range.
            dtype: dtype of q, k and v; the others are float32, or float64 when it is.
            device: where.

        Returns:
            q, k, v, gates and parameters by keyword: `rule(**rule.random_inputs(...))`.
        """
        return inputs.random_inputs(
            self, Dimensions(batch, heads, key_dim, value_dim, slots), tokens, seed, extreme, dtype, device
        )
