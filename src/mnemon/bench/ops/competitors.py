"""Who takes part: the forms of a rule, the same recurrence elsewhere, and how one run of each is made and timed.

Every run gets inputs of its own, made before the clock starts and sharing no memory with those of another run.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mnemon.bench.models import DTYPES
from mnemon.bench.ops.peers import PEERS, Compute, Inputs
from mnemon.bench.ops.settings import OpsSettings
from mnemon.errors import BackendUnavailable
from mnemon.ops import choose_form
from mnemon.ops.kernels import fla
from mnemon.ops.rule import UpdateRule

RECURRENT_LIMIT, PEER_LIMIT = 4096, 8192
"""Tokens up to which the recurrent form and published PyTorch code run: they would keep gigabytes for a gradient."""

CHUNKWISE, KERNEL = "chunkwise", "fla kernel"
_CONSTANTS = ("initial_state", "A")  # inputs that others have and our forms do not: nobody computes their gradients


@dataclass(frozen=True)
class Competitor:
    """One way of computing a rule.

    Attributes:
        name: what tables call it.
        compute: (**inputs) -> (output, state).
        arguments: (length T) -> inputs that nobody else has.
        growth: power of the length that the time is expected to grow with.
        limit: largest length it is given, or None.
        refusal: why it cannot run at all, or an empty string.
    """

    name: str
    compute: Compute
    arguments: Callable[[int], Inputs]
    growth: int = 1
    limit: int | None = None
    refusal: str = ""


class Run:
    """One competitor at one length: `prepare` makes its inputs, calling it is what is timed.

    Args:
        competitor: who.
        length: tokens T per sequence.
        backward: compute the gradients of all floating-point inputs too, from a random gradient of the output.
    """

    def __init__(self, competitor: Competitor, length: int, backward: bool) -> None:
        self.competitor, self.length, self.backward = competitor, length, backward
        self.inputs: Inputs = {}
        self.cotangent: Tensor | None = None

    def prepare(self) -> None:
        """Make fresh inputs and, for a backward pass, the gradient of the output."""
        self.inputs = self.competitor.arguments(self.length)
        if self.backward:
            self.inputs = {name: value if name in _CONSTANTS else _leaf(value) for name, value in self.inputs.items()}
            value = next(self.inputs[name] for name in ("v", "value", "hidden_states") if name in self.inputs)
            generator = torch.Generator().manual_seed(1)
            self.cotangent = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)

    def release(self) -> None:
        """Let the inputs go."""
        self.inputs, self.cotangent = {}, None

    def __call__(self) -> dict[str, Tensor]:
        """Compute; returns the output, and with `backward` the gradients by input."""
        if not self.backward:
            with torch.no_grad():
                return {"output": self.competitor.compute(**self.inputs)[0]}
        output, _ = self.competitor.compute(**self.inputs)
        wanted = {name: value for name, value in self.inputs.items() if _is_differentiable(value)}
        gradients = torch.autograd.grad(output, list(wanted.values()), self.cotangent, materialize_grads=True)
        named = zip((f"gradient of {name}" for name in wanted), gradients, strict=True)
        return {"output": output.detach(), **dict(named)}


def competitors(rule: UpdateRule, settings: OpsSettings) -> list[Competitor]:
    """List who computes a rule here: its forms, flash-linear-attention's kernel alone, and published code.

    Args:
        rule: the rule.
        settings: sizes, lengths and device.
    """
    longest = draw(rule, settings, settings.batch_size, settings.lengths[-1])
    own = partial(_cut, rule, longest)
    found = [Competitor("recurrent", rule.recurrent, own, limit=RECURRENT_LIMIT)]
    if rule.chunkwise_form is not None:
        found.append(Competitor(CHUNKWISE, rule.chunkwise, own))
    if rule.fla_form is not None and settings.device.startswith("cuda"):
        found += _kernels(rule, own, settings.lengths[0])
    peer = PEERS.get(rule.name)
    compute = peer.load() if peer is not None else None
    if peer is not None and compute is not None:
        # growth: in the backward pass every chunk's gradient is added into a tensor of the whole sequence.
        found.append(
            Competitor("transformers", compute, lambda length: peer.arguments(own(length)), growth=2, limit=PEER_LIMIT)
        )
    return found


def draw(rule: UpdateRule, settings: OpsSettings, batch: int, length: int) -> Inputs:
    """Draw inputs of a rule at the settings' sizes."""
    width = settings.head_dim
    dtype = DTYPES[settings.dtype]
    sizes = (batch, length, settings.num_heads, width, width)
    return dict(rule.random_inputs(*sizes, slots=settings.num_slots, dtype=dtype, device=settings.device))


def _kernels(rule: UpdateRule, own: Callable[[int], Inputs], length: int) -> list[Competitor]:
    """Return the fla form and the kernel below it, as a user of flash-linear-attention would call it."""
    inputs = own(length)
    try:
        choose_form(rule, inputs["q"], inputs["v"], "fla")
    except BackendUnavailable as error:
        return [Competitor("fla", rule.fla, own, refusal=str(error))]
    return [Competitor("fla", rule.fla, own), Competitor(KERNEL, *_kernel(rule, own, length))]


def _kernel(rule: UpdateRule, own: Callable[[int], Inputs], length: int) -> tuple[Compute, Callable[[int], Inputs]]:
    """Watch one call of the fla form to learn its kernel, and what it is given."""

    def watch(length: int) -> tuple[str, str, Inputs]:
        with torch.no_grad(), mock.patch.object(fla, "call", wraps=fla.call) as spy:
            rule.fla(**own(length))
        module, function, q, k, v, state, _ = spy.call_args.args
        given = {"q": q, "k": k, "v": v, "initial_state": state, **spy.call_args.kwargs}
        return module, function, {name: _copy(value) for name, value in given.items()}

    module, function, _ = watch(length)
    kernel = getattr(importlib.import_module(f"fla.ops.{module}"), function)

    def compute(**inputs: Any) -> tuple[Tensor, Any]:
        output, state = kernel(**inputs, scale=1.0, output_final_state=True, cu_seqlens=None)[:2]
        return output, state

    return compute, lambda length: watch(length)[2]


def _cut(rule: UpdateRule, inputs: Inputs, length: int) -> Inputs:
    """Copy the first tokens; what is not per token is copied whole."""
    per_token = {"q", "k", "v", *(gate.name for gate in rule.gates)}
    return {name: _copy(value[:, :length] if name in per_token else value) for name, value in inputs.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, tuple):  # a state of several tensors
        copied = map(_copy, value)
        return type(value)(*copied) if hasattr(value, "_fields") else tuple(copied)
    return value


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
