"""Which models stand beside LM2 and RMT in a comparison, and what each of them rules out.

"LM2 beats Llama" alone may only say that positions do not extrapolate. So three controls stand beside it: the plain
model; the same LM2 with its bank knocked out (what the bank itself does); and the plain model restricted to LM2's
attention window (what forgetting the far text does). RMT is knocked out in the same way: every segment then finds the
memory as the first one does. This module tells roles apart and says what is missing or unequal.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mnemon.evaluation.results import ModelInfo
from mnemon.evaluation.retrieval import Retriever
from mnemon.models.parameters import active_parameters, memory_parameters
from mnemon.models.provenance import SHOWN, model_fingerprint

ROLES: dict[str, str] = {
    "lm2": "LM2, with its memory bank",
    "rmt": "RMT or ARMT, with its memory",
    "knocked_out": "the same weights, memory knocked out: what is left without it",
    "plain": "the plain decoder, every earlier token in sight",
    "window": "the plain decoder restricted to LM2's attention window",
}

KNOCK_OUT = {"knock_out_memory": True}
KNOCKED_OUT = " (knocked out)"
"""End of the label of a control row."""

_EQUAL_PARAMETERS = 0.02


@dataclass(frozen=True)
class ModelSpec:
    """One row of a comparison: a model, its tokenizer and how to call it.

    Attributes:
        label: name in tables and plots.
        generate_kwargs: further arguments of `model.generate`.
        source: folder or name it was loaded from.
        training: facts about its training (tokens seen, longest length), as far as known.
        retriever: finds the part of every text that the model reads; None reads the whole text.
    """

    label: str
    model: Any
    tokenizer: Any
    generate_kwargs: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    retriever: Retriever | None = None


def has_memory(model: Any) -> bool:
    """Tell whether a model has a memory that can be knocked out."""
    takes_it = "knock_out_memory" in inspect.signature(model.forward).parameters
    return takes_it and getattr(model.config, "memory_layers", None) != []


def knocked_out(spec: ModelSpec) -> ModelSpec:
    """Give the control row of a model with a memory: same weights, memory silenced."""
    return replace(spec, label=f"{spec.label}{KNOCKED_OUT}", generate_kwargs={**spec.generate_kwargs, **KNOCK_OUT})


def with_retrieval(spec: ModelSpec, retriever: Retriever) -> ModelSpec:
    """Give the row of a model that reads only what a retriever found."""
    return replace(spec, label=f"{spec.label} ({retriever.settings.name})", retriever=retriever)


def all_rows(specs: Sequence[ModelSpec], retriever: Retriever | None, *, controls: bool) -> list[ModelSpec]:
    """Give the rows of a comparison.

    Args:
        specs: the models, reading whole texts.
        retriever: add every model once more, reading only what this finds.
        controls: add every model with a memory once more with it knocked out; with a retriever, keep the rows that
            read whole texts, for they are the controls of those that do not.
    """
    whole = with_controls(specs) if controls else list(specs)
    if retriever is None:
        return whole
    found = [with_retrieval(spec, retriever) for spec in specs]
    return [*whole, *found] if controls else found


def with_controls(specs: Sequence[ModelSpec]) -> list[ModelSpec]:
    """Add after every model with a memory its knocked-out row, unless it is there already."""
    rows: list[ModelSpec] = []
    for spec in specs:
        rows.append(spec)
        wanted = has_memory(spec.model) and not spec.generate_kwargs.get("knock_out_memory")
        if wanted and not any(
            other.model is spec.model and other.generate_kwargs.get("knock_out_memory") for other in specs
        ):
            rows.append(knocked_out(spec))
    return rows


def role_of(spec: ModelSpec) -> str:
    """Say which role a row plays: see `mnemon.evaluation.results.ModelInfo`."""
    if spec.retriever is not None:
        return "retrieval"
    config = spec.model.config
    if has_memory(spec.model):
        if spec.generate_kwargs.get("knock_out_memory"):
            return "knocked_out"
        return "rmt" if config.model_type == "rmt" else "lm2"
    if config.model_type == "mom":
        types = config.layer_types
        return "linear_memory" if types is not None and "mom" not in types else "mom"
    windowed = getattr(config, "attention_span", None) or getattr(config, "sliding_window", None)
    return "window" if windowed else "plain"


def describe_model(spec: ModelSpec) -> ModelInfo:
    """Collect what a reader must know about a row: role, size, share of the memory, training."""
    return ModelInfo(
        source=spec.source,
        model_type=str(getattr(spec.model.config, "model_type", type(spec.model).__name__)),
        role=role_of(spec),
        num_parameters=sum(parameter.numel() for parameter in spec.model.parameters()),
        num_memory_parameters=memory_parameters(spec.model),
        num_active_parameters=active_parameters(spec.model),
        weights=weights_fingerprint(spec.model),
        training=spec.training,
        retrieval={} if spec.retriever is None else spec.retriever.settings.value(),
    )


def weights_fingerprint(model: Any) -> str:
    """Give a short form of a model's fingerprint, so that stored cells are not mistaken for another model's."""
    return model_fingerprint(model, remembered=False)[:SHOWN]


def control_notes(models: Sequence[tuple[str, ModelInfo]]) -> list[str]:
    """Say in sentences which controls a comparison has, which it lacks, and where its models are not equal.

    Args:
        models: label and description of every row.

    Returns:
        One sentence per line; empty for a single model without memory.
    """
    roles = {role: [label for label, info in models if info.role == role] for role in ROLES}
    wanted: tuple[str, ...] = ()
    if roles["lm2"]:
        wanted = ("knocked_out", "plain", "window")
    elif roles["rmt"]:  # knocked out, it reads every segment alone, which is what a window would show
        wanted = ("knocked_out", "plain")
    elif len(models) < 2:
        return []
    notes = []
    for role in wanted:
        found = ", ".join(roles[role]) or "NOT evaluated in this run"
        notes.append(f"Control, {ROLES[role]}: {found}.")
    return notes + _inequalities(models)


def _inequalities(models: Sequence[tuple[str, ModelInfo]]) -> list[str]:
    notes = []
    models = [(label, info) for label, info in models if info.role not in ("knocked_out", "retrieval")] or list(models)
    sizes = {label: info.num_parameters for label, info in models}
    if max(sizes.values()) > (1 + _EQUAL_PARAMETERS) * min(sizes.values()):
        listing = ", ".join(f"{label} {size:,}" for label, size in sizes.items())
        notes.append(f"The models differ in size by more than {100 * _EQUAL_PARAMETERS:.0f} %: {listing} parameters.")
    for key, name in (("tokens", "tokens seen in training"), ("trained_length", "longest training length")):
        values = {label: info.training.get(key) for label, info in models}
        known = {value for value in values.values() if value is not None}
        if len(known) > 1:
            listing = ", ".join(f"{label} {value:,}" for label, value in values.items() if value is not None)
            notes.append(f"The models differ in {name}: {listing}.")
    return notes
