"""The forms of a rule: which one runs, and how a call reaches it.

- recurrent: the definition, token by token (`mnemon.ops.scan`).
- chunkwise: matrix products inside chunks of tokens, in PyTorch.
- fla: the kernels of flash-linear-attention on a GPU (`mnemon.ops.kernels.fla`).
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mnemon.errors import BackendUnavailable, ConfigError
from mnemon.ops.blocks import compute_rows
from mnemon.ops.kernels import fla
from mnemon.ops.masking import masked, take, valid_first
from mnemon.ops.packing import pack_rows, unpack_rows
from mnemon.ops.scan import scan

if TYPE_CHECKING:
    from mnemon.ops.rule import UpdateRule
    from mnemon.ops.validation import Call

FORMS = ("auto", "recurrent", "chunkwise", "fla")


class FormChoice(NamedTuple):
    """The form that runs, and why it was chosen."""

    form: str
    reason: str


def choose_form(rule: "UpdateRule", q: Tensor, v: Tensor, form: str = "auto") -> FormChoice:
    """Say which form computes a call.

    Args:
        rule: the rule.
        q: queries, [B, T, H, K].
        v: values, [B, T, H, V].
        form: the form asked for; "auto" leaves the choice to this function.

    Returns:
        The form and the reason.

    Raises:
        ConfigError: if there is no form of that name.
        BackendUnavailable: if the form asked for cannot run here.
    """
    if form not in FORMS:
        raise ConfigError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if form != "auto":
        refusal = _refusal(rule, form, q)
        if refusal:
            raise BackendUnavailable(
                f"{rule.name}: form={form!r} cannot run: {refusal}; form='auto' picks one that can"
            )
        return FormChoice(form, "asked for")
    if q.shape[1] <= 1:
        return FormChoice("recurrent", "one token needs one step")
    refusal = _refusal(rule, "fla", q)
    if refusal is None:
        return FormChoice("fla", "the tensors are on a GPU and flash-linear-attention has this rule")
    if rule.chunkwise_form is None:
        return FormChoice("recurrent", "the rule has no faster form")
    return FormChoice("chunkwise", f"fla cannot run: {refusal}")


def _refusal(rule: "UpdateRule", form: str, q: Tensor) -> str | None:
    """Say why a form cannot run, or None."""
    if form == "chunkwise" and rule.chunkwise_form is None:
        return "the rule has no chunkwise form"
    if form != "fla":
        return None
    if rule.fla_form is None:
        return "flash-linear-attention has no kernel of this rule"
    if q.device.type != "cuda":
        return f"its kernels need a GPU and the tensors are on {q.device}"
    if q.dtype == torch.float64:
        return "its kernels do not compute in float64"
    if rule.fla_form.max_key_dim is not None and q.shape[-1] > rule.fla_form.max_key_dim:
        return f"its kernels take keys of at most {rule.fla_form.max_key_dim} numbers, got {q.shape[-1]}"
    return fla.why_unavailable()


def run(rule: "UpdateRule", call: "Call", form: str) -> tuple[Tensor, Any]:
    """Compute a checked call in the form asked for, or in the one `choose_form` picks for "auto"."""
    chosen = choose_form(rule, call.q, call.v, form).form
    if chosen == "recurrent":
        return run_recurrent(rule, call)
    return run_fla(rule, call) if chosen == "fla" else run_chunkwise(rule, call, None)


def run_recurrent(rule: "UpdateRule", call: "Call") -> tuple[Tensor, Any]:
    """Compute a checked call token by token."""
    with _without_autocast(call):
        return scan(rule, call)


def run_fla(rule: "UpdateRule", call: "Call") -> tuple[Tensor, Any]:
    """Compute a checked call with flash-linear-attention's kernels."""
    choose_form(rule, call.q, call.v, "fla")
    assert rule.fla_form is not None
    q, k, v, gates = call.q, call.k, call.v, call.gates | call.options
    if call.mask is not None:
        q, k, v, gates = masked(rule, q, k, v, call.mask, gates)
    with _without_autocast(call):
        output, state = rule.fla_form.call(q, k, v, call.state, call.cu_seqlens, **gates)
    return output.to(call.v.dtype), state


def run_chunkwise(rule: "UpdateRule", call: "Call", chunk_size: int | None) -> tuple[Tensor, Any]:
    """Compute a checked call in chunks.

    Packed sequences of similar length are computed side by side as the rows of a batch; masked tokens become identity
    inputs or, for a rule that counts tokens, move to the end of their row.
    """
    choose_form(rule, call.q, call.v, "chunkwise")
    chunk_size = rule.chunk_size if chunk_size is None else chunk_size
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ConfigError(f"{rule.name}: chunk_size must be an integer of at least 1, got {chunk_size!r}")
    with _without_autocast(call):
        return _run_chunks(rule, call, chunk_size)


def _run_chunks(rule: "UpdateRule", call: "Call", chunk_size: int) -> tuple[Tensor, Any]:
    tensors = {"q": call.q, "k": call.k, "v": call.v, **call.gates}
    if call.cu_seqlens is not None:
        groups = unpack_rows(tensors, call.state, call.cu_seqlens)
        done = [
            compute_rows(rule, group.tensors, group.state, group.mask, call.options, chunk_size) for group in groups
        ]
        return pack_rows(groups, done, call.v)
    if call.mask is not None and rule.counts_tokens:
        order, back = valid_first(call.mask)
        front = {name: take(tensor, order) for name, tensor in tensors.items()}
        output, state = compute_rows(rule, front, call.state, take(call.mask, order), call.options, chunk_size)
        return take(output, back), state
    return compute_rows(rule, tensors, call.state, call.mask, call.options, chunk_size)


def _without_autocast(call: "Call") -> torch.autocast:
    """Return a context in which a memory stays in float32: autocast would take its products in bfloat16."""
    return torch.autocast(call.v.device.type, enabled=False)
