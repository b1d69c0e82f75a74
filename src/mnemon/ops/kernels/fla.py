"""The one place that talks to flash-linear-attention (`pip install "mnemon[cuda]"`).

Our conventions become its own here: no scaling of the queries (its default is K^-1/2), states [N, H, K, V] float32,
gates float32, boundaries int64, and no empty packed sequences (its kernels do not expect them).
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from mnemon.errors import BackendUnavailable
from mnemon.ops.state import combine

_PACKAGE = "fla"


_IMPORT_FAULTS = (ImportError, AttributeError, RuntimeError, ValueError)  # Triton fails in any of these ways


def why_unavailable() -> str | None:
    """Say why flash-linear-attention cannot be used here, or return None."""
    return _import_fault(_PACKAGE)


@functools.cache
def _import_fault(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return 'flash-linear-attention is not installed (pip install "mnemon[cuda]")'
    try:
        importlib.import_module(f"{package}.ops")
    except _IMPORT_FAULTS as error:
        return f"flash-linear-attention cannot be imported ({_one_line(error)})"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def call(
    module: str,
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Any,
    cu_seqlens: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, Any]:
    """Call a kernel of flash-linear-attention in our conventions.

    Args:
        module: module below `fla.ops`, such as "gated_delta_rule".
        function: its function, such as "chunk_gated_delta_rule".
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        state: state before the first token, [N, H, K, V].
        cu_seqlens: boundaries of packed sequences, or None.
        arguments: gates and options under the kernel's own names.

    Returns:
        Output [B, T, H, V] and the state after the last token.

    Raises:
        BackendUnavailable: if the package or the function cannot be imported; the message says why.
    """
    kernel = _load(module, function)
    rows = None
    before = state
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        if not bool((lengths > 0).all()):
            rows = torch.nonzero(lengths > 0).flatten().to(q.device)
            cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[1:][lengths > 0]])
            state = combine(lambda tensor: tensor.index_select(0, rows), state)
        cu_seqlens = cu_seqlens.to(q.device, torch.long)
    output, final = kernel(
        q, k, v, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, **arguments
    )[:2]
    if rows is not None:
        final = combine(lambda old, new: old.index_copy(0, rows, new), before, final)
    return output, final


def _load(module: str, function: str) -> Any:
    try:
        return getattr(importlib.import_module(f"{_PACKAGE}.ops.{module}"), function)
    except _IMPORT_FAULTS as error:
        raise BackendUnavailable(
            f"{_PACKAGE}.ops.{module}.{function} cannot be loaded ({_one_line(error)}); form='auto' picks another form"
        ) from error
