"""The forms of a rule: which one runs, and how a call is cut into the blocks a chunkwise form computes.

- recurrent: the definition, token by token (`mnemon.ops.scan`).
- chunkwise: matrix products inside chunks of tokens, in PyTorch.
- fla: the kernels of flash-linear-attention on a GPU (`mnemon.ops.kernels.fla`).
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mnemon.errors import BackendUnavailable, ConfigError
from mnemon.ops.kernels import fla
from mnemon.ops.masking import masked, take, valid_first
from mnemon.ops.packing import pack_rows, unpack_rows
from mnemon.ops.scan import scan
from mnemon.ops.state import state_dtype

if TYPE_CHECKING:
    from mnemon.ops.rule import UpdateRule
    from mnemon.ops.validation import Call

FORMS = ("auto", "recurrent", "chunkwise", "fla")

_SMALLEST_CHUNK = 16
# Numbers of one input (such as v) in a block. Temporaries of this size stay in the cache and are allocated again and
# again in the same place; whole-sequence temporaries would touch fresh memory, which costs more than the arithmetic.
_BLOCK_NUMBERS = 2**17
_BLOCKS_KEPT = 4  # blocks whose intermediate results are kept for the backward pass


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
    return scan(rule, call)


def run_fla(rule: "UpdateRule", call: "Call") -> tuple[Tensor, Any]:
    """Compute a checked call with flash-linear-attention's kernels."""
    choose_form(rule, call.q, call.v, "fla")
    assert rule.fla_form is not None
    q, k, v, gates = call.q, call.k, call.v, call.gates | call.options
    if call.mask is not None:
        q, k, v, gates = masked(rule, q, k, v, call.mask, gates)
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
    tensors = {"q": call.q, "k": call.k, "v": call.v, **call.gates}
    if call.cu_seqlens is not None:
        groups = unpack_rows(tensors, call.state, call.cu_seqlens)
        done = [_rows(rule, group.tensors, group.state, group.mask, call.options, chunk_size) for group in groups]
        return pack_rows(groups, done, call.v)
    if call.mask is not None and rule.counts_tokens:
        order, back = valid_first(call.mask)
        front = {name: take(tensor, order) for name, tensor in tensors.items()}
        output, state = _rows(rule, front, call.state, take(call.mask, order), call.options, chunk_size)
        return take(output, back), state
    return _rows(rule, tensors, call.state, call.mask, call.options, chunk_size)


def _rows(
    rule: "UpdateRule",
    tensors: dict[str, Tensor],
    state: Any,
    mask: Tensor | None,
    options: dict[str, Any],
    chunk_size: int,
) -> tuple[Tensor, Any]:
    """Compute a batch of rows block by block, carrying the state."""
    assert rule.chunkwise_form is not None
    v = tensors["v"]
    batch, tokens, heads, value_dim = v.shape
    if tokens == 0:
        return torch.zeros_like(v), state
    chunk_size = max(min(chunk_size, -(-tokens // _SMALLEST_CHUNK) * _SMALLEST_CHUNK), 1)
    row_numbers = max(batch * heads * max(value_dim, tensors["q"].shape[-1]), 1)
    block = max(_BLOCK_NUMBERS // row_numbers // chunk_size, 1) * chunk_size
    if mask is not None:
        tensors = tensors | {"mask": mask}
    # One split instead of slices: its backward joins the gradients once, where every slice would fill a whole tensor.
    blocks = zip(*(tensor.split(block, dim=1) for tensor in tensors.values()), strict=True)
    again = tokens > _BLOCKS_KEPT * block and torch.is_grad_enabled() and not rule.light_backward
    outputs = []
    for parts in blocks:
        arguments = (rule, dict(zip(tensors, parts, strict=True)), state, options, chunk_size)
        if again:
            output, state = checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            output, state = _block(*arguments)
        outputs.append(output)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state


def _block(
    rule: "UpdateRule", tensors: dict[str, Tensor], state: Any, options: dict[str, Any], chunk_size: int
) -> tuple[Tensor, Any]:
    """Compute one block: fill it up to whole chunks and hide what does not count."""
    assert rule.chunkwise_form is not None
    mask = tensors.get("mask")
    tensors = {name: tensor for name, tensor in tensors.items() if name != "mask"}
    tokens = tensors["v"].shape[1]
    missing = -tokens % chunk_size
    if missing:
        if mask is None and rule.counts_tokens:
            mask = tensors["v"].new_ones(tensors["v"].shape[:2], dtype=torch.bool)
        mask = None if mask is None else _extend(mask, missing, 0.0)
        fill = {gate.name: gate.identity for gate in rule.gates}
        tensors = {name: _extend(tensor, missing, fill.get(name, 0.0)) for name, tensor in tensors.items()}
    output_dtype = tensors["v"].dtype
    dtype = state_dtype(output_dtype)
    q, k, v = (tensors.pop(name) for name in ("q", "k", "v"))
    keywords: dict[str, Any] = tensors
    if mask is not None:
        q, k, v, keywords = masked(rule, q, k, v, mask, keywords)
    elif rule.counts_tokens:
        keywords = keywords | {"mask": None}
    output, state = rule.chunkwise_form(
        q.to(dtype), k.to(dtype), v.to(dtype), state, chunk_size=chunk_size, **keywords, **options
    )
    return output[:, :tokens].to(output_dtype), state


def _extend(tensor: Tensor, missing: int, value: float) -> Tensor:
    """Append tokens of one value to [B, T, ...]."""
    return torch.cat([tensor, tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), value)], dim=1)
