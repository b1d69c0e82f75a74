"""Which model a memory belongs to, so that a memory is never read by other weights than those that made it.

A memory means nothing to another model, and a model that was trained on is another model. Every state carries an
`Origin`. While a model runs, comparing the origin costs one comparison of pointers; where a memory is put to use
(`generate(memory=...)`, `memorize`, `save`) the weights are compared, too:

1. by a `Stamp`, without a pass over the weights: shapes and version counters of all parameters (every change in place
   counts one up, a move to another device does not), a few values of each, and how PEFT's layers are switched;
2. where the stamp does not decide (another object of the same weights, a file), by `model_fingerprint`.

What is not noticed: a few values changed through `parameter.data`, which no counter sees, in tensors of which the
sampled values stayed the same.
"""

import hashlib
import inspect
import json
import weakref
from dataclasses import Field, dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mnemon.errors import StateError
from mnemon.models.base_model import fingerprint, fingerprint_of, peft_layers

SHOWN = 16  # digits of a fingerprint in a message: enough to tell two apart
_SAMPLED = 16  # values of every tensor in a stamp
_FINGERPRINTS: "weakref.WeakKeyDictionary[nn.Module, tuple[Stamp, str]]" = weakref.WeakKeyDictionary()
# What a configuration says of where it came from and how it runs, and not of what the model computes.
_PASSING = frozenset(
    "_name_or_path transformers_version architectures dtype torch_dtype use_cache _attn_implementation _commit_hash "
    "_attn_implementation_internal attn_implementation bos_token_id eos_token_id pad_token_id initializer_range "
    "initial_output id2label label2id num_labels problem_type tokenizer_class output_attentions "
    "output_hidden_states".split()
)

# Options that configurations have gained since memories are saved: at their default they say nothing, so that a memory
# that was saved before still belongs to its model.
_GAINED = {
    "lm2": ("skip_gate", "write_cost", "coupled_gates", "write_query", "write_conv"),
    "rmt": ("gate_stretch",),
}


class Stamp(NamedTuple):
    """What tells, without a pass over them, whether a model's weights have changed.

    Attributes:
        tensors: shape, dtype and version counter of every parameter.
        switches: how PEFT's layers are switched: what is active, disabled, merged.
        sample: a few values of every parameter, where these are; None if none were taken, as while training, when
            every change counts a version up.
    """

    tensors: tuple[tuple[tuple[int, ...], torch.dtype, int], ...]
    switches: tuple[str, ...]
    sample: Tensor | None

    def agrees(self, other: "Stamp") -> bool:
        """Say whether two stamps are of the same weights (on any device)."""
        if self.tensors != other.tensors or self.switches != other.switches:
            return False
        if self.sample is None or other.sample is None:
            return True
        return torch.equal(self.sample.cpu().nan_to_num(), other.sample.cpu().nan_to_num())


@dataclass(frozen=True, eq=False)
class Origin:
    """Who made a state.

    Attributes:
        model_class: class of the model, such as `LM2ForCausalLM`.
        family: "lm2", "mom" or "rmt".
        fingerprint: of the weights that made the state, where it is known (`model_fingerprint`).
        tokenizer: fingerprint of the tokenizer, where it is known (`mnemon.models.memory_file`).
        reference: the model itself while it lives; None for a state from a file.
        stamp: of its weights when the state was begun.
    """

    model_class: str
    family: str
    fingerprint: str | None = None
    tokenizer: str | None = None
    reference: "weakref.ReferenceType[nn.Module] | None" = None
    stamp: Stamp | None = None

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return the origin of a state that a model begins now."""
        return cls(type(model).__name__, model.config.model_type, None, None, weakref.ref(model), stamp_of(model))

    @property
    def model(self) -> nn.Module | None:
        """The model, while it lives; None for a state from a file."""
        return None if self.reference is None else self.reference()

    def known_fingerprint(self) -> str | None:
        """Return the fingerprint of the weights that made the state; None if these are gone or have changed."""
        if self.fingerprint is not None:
            return self.fingerprint
        model = self.model
        if model is None or self.stamp is None or not self.stamp.agrees(stamp_of(model)):
            return None
        return model_fingerprint(model)

    def agrees(self, other: "Origin") -> bool:
        """Say whether two states were made by the same weights."""
        if self is other:
            return True
        model = self.model
        if model is not None and model is other.model and self.stamp is not None and other.stamp is not None:
            return self.stamp.agrees(other.stamp)
        mine = self.known_fingerprint()
        return mine is not None and mine == other.known_fingerprint()

    def __deepcopy__(self, _: Any) -> "Origin":
        return self

    def __reduce__(self) -> Any:
        """Pickle as what a file would say: another process has other objects."""
        known = self.known_fingerprint()
        if known is None:
            raise StateError("a memory whose model is gone or has changed since cannot be sent to another process")
        return Origin, (self.model_class, self.family, known, self.tokenizer)


def check_origin(origin: Origin | None, model: Any, weights: bool) -> Origin:
    """Return the origin of a state that a model may go on from, bound to that model.

    Args:
        origin: who made the state.
        model: who is to use it.
        weights: compare the weights even if the object is the same. In a training loop they change from step to step
            while a state is carried on, which is for the loop to know.
    Raises:
        StateError: if other weights made the state, or that cannot be found out.
    """
    if origin is None:
        raise StateError("the memory does not say which model made it; take one from memorize, forward or a file")
    same_object = origin.model is model
    if same_object and not weights:
        return origin
    now = stamp_of(model)
    if same_object and origin.stamp is not None and origin.stamp.agrees(now):
        return origin
    wanted = origin.known_fingerprint()
    found = None if wanted is None else model_fingerprint(model)
    if wanted is not None and wanted == found:
        return Origin(type(model).__name__, model.config.model_type, found, origin.tokenizer, weakref.ref(model), now)
    if same_object:
        raise StateError(
            "the memory was made before the model's weights changed (training, loading, merging, another dtype); "
            "memorize the text again"
        )
    if wanted is None or found is None:
        raise StateError(
            f"the memory was made by another {origin.model_class}, which is gone or has changed since, so that it "
            "cannot be compared with this one; memorize the text again"
        )
    raise StateError(
        f"the memory is of another model: it was made by {origin.model_class} {wanted[:SHOWN]}, this is "
        f"{type(model).__name__} {found[:SHOWN]}; load that model, or memorize the text with this one"
    )


@torch.no_grad()
def stamp_of(model: nn.Module) -> Stamp:
    """Return the stamp of a model's weights as they are now; nothing waits for a device."""
    tensors, samples = [], []
    for parameter in model.parameters():
        version = 0 if parameter.is_inference() else parameter._version
        tensors.append((tuple(parameter.shape), parameter.dtype, version))
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # of a sharded one, what is here
        if local.numel() and not local.is_meta and not model.training:
            samples.append(_sample(local))
    first = samples[0].device if samples else None
    near = [sample if sample.device == first else sample.to(first, non_blocking=True) for sample in samples]
    return Stamp(tuple(tensors), _switches(model), torch.cat(near) if near else None)


@torch.no_grad()
def model_fingerprint(model: nn.Module, remembered: bool = True) -> str:
    """Return the sha256 of a model: its configuration, all its own tensors, and PEFT's layers if there are any.

    It is the same on every device and in every process, however the model was loaded; the same weights in another dtype
    are another model.

    Args:
        model: the model.
        remembered: spare the pass over the weights (`base_model.fingerprint`) while their stamp stays the same.
    """
    now = stamp_of(model)
    known = _FINGERPRINTS.get(model)
    if remembered and known is not None and known[0].agrees(now):
        return known[1]
    parts = [_described(getattr(model, "config", None)), fingerprint(model)]
    if peft_layers(model):
        parts += [list(now.switches), fingerprint_of(model.state_dict(keep_vars=True))]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=_as_json).encode()).hexdigest()
    _FINGERPRINTS[model] = (now, digest)
    return digest


def _sample(tensor: Tensor) -> Tensor:
    count = min(_SAMPLED, tensor.numel())
    step = tensor.numel() // count
    flat = tensor if tensor.is_contiguous() else tensor.contiguous()
    values = flat.as_strided((count,), (step,))  # one call instead of three, for every parameter
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _switches(model: nn.Module) -> tuple[str, ...]:
    """Return how PEFT's layers are switched, one text for each."""
    return tuple(
        f"{getattr(module, 'disable_adapters', None)} {getattr(module, 'active_adapters', None)} "
        f"{getattr(module, 'merged_adapters', None)}"
        for module in model.modules()
        if hasattr(type(module), "merged_adapters")
    )


def _described(config: Any) -> Any:
    """Return what a configuration says about the computation, as JSON, without the library's defaults."""
    if not isinstance(config, PreTrainedConfig):
        return None
    base = getattr(config, "base_config", None)
    if isinstance(base, PreTrainedConfig):
        own = {field.name: getattr(config, field.name) for field in fields(config) if _counts(config, field)}
        return {"model_type": config.model_type, "own": own, "base": _described(base)}
    return {"model_type": config.model_type} | _without_passing(config.to_diff_dict())


def _counts(config: PreTrainedConfig, field: Field[Any]) -> bool:
    """Say whether a field is of our configurations, not of the library's own, and says something."""
    is_gained = field.name in _GAINED.get(config.model_type, ())
    if field.name in _PASSING or (is_gained and getattr(config, field.name) == field.default):
        return False
    ours = (cls for cls in type(config).__mro__ if cls.__module__.startswith("mnemon."))
    return field.name != "base_config" and any(field.name in inspect.get_annotations(cls) for cls in ours)


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _without_passing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_passing(part) for key, part in value.items() if key not in _PASSING}
    return value
