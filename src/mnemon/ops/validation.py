"""Check a call of an update rule once, at the door, so that no form has to.

Every message is one line: what was expected, what arrived, what to do. Checks that look at values run on the CPU only;
on a GPU they would wait for the device.
"""

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mnemon.errors import ConfigError, ShapeError, StateError
from mnemon.ops.declaration import LIMITS, Dimensions, HyperParameter, Range
from mnemon.ops.inputs import axis_sizes, gate_shape
from mnemon.ops.state import leaves, state_dtype

if TYPE_CHECKING:
    from mnemon.ops.rule import UpdateRule


class Call(NamedTuple):
    """A checked call.

    Attributes:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: state before the first token, always given.
        gates: tensors by keyword, one value per token each.
        options: parameters and all hyper-parameters by keyword.
        cu_seqlens: boundaries of packed sequences [N + 1], or None.
        mask: True where a token counts [B, T], or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    state: Any
    gates: dict[str, Tensor]
    options: dict[str, Any]
    cu_seqlens: Tensor | None
    mask: Tensor | None


def check(
    rule: "UpdateRule",
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Any,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    keywords: dict[str, Any],
) -> Call:
    """Check everything a caller can get wrong and return the call, with the initial state filled in.

    Args:
        rule: the rule.
        q: queries.
        k: keys.
        v: values.
        state: state, or None.
        cu_seqlens: boundaries, or None.
        mask: mask, or None.
        keywords: gates, parameters and hyper-parameters.

    Returns:
        The checked call.

    Raises:
        ShapeError: for q, k, v, gates, parameters, mask and boundaries.
        ConfigError: for unknown keywords and hyper-parameters.
        StateError: for the state.
    """
    _check_inputs(rule, q, k, v)
    gates, options = _sort_keywords(rule, keywords)
    dimensions = _dimensions(rule, q, v, gates, cu_seqlens)
    dtype = state_dtype(v.dtype)
    for gate in rule.gates:
        expected = gate_shape(gate, dimensions._replace(sequences=q.shape[0]), q.shape[1])
        _check_tensor(rule, gate.name, gates[gate.name], expected, dtype, v.device)
        _check_range(rule, gate.name, gate.kind, gates[gate.name])
    sizes = axis_sizes(dimensions)
    for parameter in rule.parameters:
        expected = tuple(sizes[axis] for axis in parameter.axes)
        _check_tensor(rule, parameter.name, options[parameter.name], expected, dtype, v.device)
    if mask is not None:
        if cu_seqlens is not None:
            raise ShapeError(f"{rule.name}: mask and cu_seqlens exclude each other; pack only the tokens that count")
        _check_tensor(rule, "mask", mask, tuple(q.shape[:2]), torch.bool, v.device)
    if state is None:
        state = rule.initial_state(dimensions, dtype, v.device, **options)
    else:
        _check_state(rule, state, rule.initial_state(dimensions, dtype, "meta", **_on_meta(options)), v.device)
    return Call(q, k, v, state, gates, options, cu_seqlens, mask)


def _check_inputs(rule: "UpdateRule", q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    if not fits:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ShapeError(f"{rule.name}: expected q and k [B, T, H, K] and v [B, T, H, V], got {shapes}")
    if rule.equal_widths and q.shape[-1] != v.shape[-1]:
        raise ShapeError(f"{rule.name}: keys and values must have the same width, got {q.shape[-1]} and {v.shape[-1]}")
    if not (q.dtype == k.dtype == v.dtype and v.is_floating_point()):
        raise ShapeError(
            f"{rule.name}: q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}; convert them"
        )
    if not q.device == k.device == v.device:
        raise ShapeError(f"{rule.name}: q, k and v are on {q.device}, {k.device}, {v.device}; move them to one device")


def _sort_keywords(rule: "UpdateRule", keywords: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split keywords into gates and options, with defaults for hyper-parameters."""
    gate_names = [gate.name for gate in rule.gates]
    parameter_names = [parameter.name for parameter in rule.parameters]
    setting_names = [setting.name for setting in rule.hyper_parameters]
    known = [*gate_names, *parameter_names, *setting_names]
    for name in keywords:
        if name not in known:
            raise ConfigError(f"{rule.name}: unknown keyword {name!r}; it takes {', '.join(known) or 'none'}")
    for name in (*gate_names, *parameter_names):
        if not isinstance(keywords.get(name), Tensor):
            raise ShapeError(
                f"{rule.name}: needs the tensor {name}, got {type(keywords.get(name)).__name__}; pass {name}="
            )
    options = check_settings(rule, {name: keywords[name] for name in setting_names if name in keywords})
    options |= {name: keywords[name] for name in parameter_names}
    return {name: keywords[name] for name in gate_names}, options


def check_settings(rule: "UpdateRule", given: dict[str, Any]) -> dict[str, Any]:
    """Check hyper-parameters and fill in the defaults of the others.

    Args:
        rule: the rule.
        given: hyper-parameters by name.

    Returns:
        All hyper-parameters by name.

    Raises:
        ConfigError: if one is unknown or impossible.
    """
    settings = {setting.name: setting for setting in rule.hyper_parameters}
    for name, value in given.items():
        if name not in settings:
            raise ConfigError(f"{rule.name}: unknown setting {name!r}; it takes {', '.join(settings) or 'none'}")
        _check_setting(rule, settings[name], value)
    return rule.defaults() | given


def _check_setting(rule: "UpdateRule", setting: HyperParameter, value: Any) -> None:
    if setting.choices is not None:
        if value not in setting.choices:
            raise ConfigError(f"{rule.name}: {setting.name} must be one of {', '.join(setting.choices)}, got {value!r}")
        return
    wanted = (int,) if isinstance(setting.default, int) else (int, float)
    too_small = isinstance(value, int | float) and setting.minimum is not None and not value >= setting.minimum
    if isinstance(value, bool) or not isinstance(value, wanted) or too_small:
        bound = "" if setting.minimum is None else f" of at least {setting.minimum}"
        kind = "an integer" if wanted == (int,) else "a number"
        raise ConfigError(f"{rule.name}: {setting.name} must be {kind}{bound}, got {value!r}")


def _dimensions(
    rule: "UpdateRule", q: Tensor, v: Tensor, gates: dict[str, Tensor], cu_seqlens: Tensor | None
) -> Dimensions:
    slots = next((gates[gate.name].shape[-1] for gate in rule.gates if gate.per == "slot"), 0)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        _check_boundaries(rule, cu_seqlens, q)
        sequences = len(cu_seqlens) - 1
    return Dimensions(sequences, q.shape[2], q.shape[3], v.shape[3], slots)


def _check_boundaries(rule: "UpdateRule", cu_seqlens: Tensor, q: Tensor) -> None:
    if q.shape[0] != 1:
        raise ShapeError(f"{rule.name}: cu_seqlens needs a batch of 1, got {q.shape[0]}; join the rows into one")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ShapeError(f"{rule.name}: cu_seqlens must be integers [N + 1] with N at least 1, got {got}")
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        rising = all(a <= b for a, b in itertools.pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != q.shape[1] or not rising:
            raise ShapeError(f"{rule.name}: cu_seqlens must rise from 0 to T = {q.shape[1]}, got {_short(bounds)}")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


def _check_tensor(
    rule: "UpdateRule", name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(value.shape) != shape:
        raise ShapeError(f"{rule.name}: {name} must have the shape {list(shape)}, got {list(value.shape)}")
    if value.dtype != dtype:
        raise ShapeError(f"{rule.name}: {name} must be {dtype} for these inputs, got {value.dtype}; convert it")
    if value.device != device:
        raise ShapeError(f"{rule.name}: {name} is on {value.device} and v on {device}; move them to one device")


def _check_range(rule: "UpdateRule", name: str, kind: Range, value: Tensor) -> None:
    if value.device.type != "cpu" or torch.compiler.is_compiling() or value.numel() == 0:
        return
    low, high = LIMITS[kind]
    least, most = (bound.item() for bound in torch.aminmax(value.detach()))
    if not (least >= low and most <= high):  # written so that NaN fails too
        raise ShapeError(f"{rule.name}: {name} must lie in [{low:g}, {high:g}], got values from {least:g} to {most:g}")


def _check_state(rule: "UpdateRule", state: Any, expected: Any, device: torch.device) -> None:
    if type(state) is not type(expected):
        raise StateError(f"{rule.name}: the state must be a {type(expected).__name__}, got a {type(state).__name__}")
    for got, want in zip(leaves(state), leaves(expected), strict=True):
        if got.shape != want.shape or got.dtype != want.dtype:
            raise StateError(
                f"{rule.name}: the state must be {want.dtype} {list(want.shape)} for these inputs, "
                f"got {got.dtype} {list(got.shape)}; it belongs to another rule, batch or size"
            )
        if got.device != device:
            raise StateError(f"{rule.name}: the state is on {got.device} and v on {device}; move it")


def _on_meta(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in options.items()}
