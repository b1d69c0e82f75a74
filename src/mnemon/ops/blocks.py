"""Compute a chunkwise form block by block, carrying the state from block to block.

A block is a number of chunks whose intermediate results fit into the processor's cache. They are allocated again and
again in the same place; those of a whole sequence would touch fresh memory, which costs more than the arithmetic. For
the same reason the blocks of a long sequence are computed a second time in the backward pass instead of keeping
everything, unless the rule's own gradient keeps little.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemon.ops.fresh import fresh
from mnemon.ops.masking import masked
from mnemon.ops.state import leaves, state_dtype

if TYPE_CHECKING:
    from mnemon.ops.rule import UpdateRule

_SMALLEST_CHUNK = 16
_WORTHWHILE = 0.125  # share of the tokens computed that smaller chunks must save
_BLOCK_NUMBERS = 2**17  # numbers of one input, such as v, in a block
_BLOCK_NUMBERS_GPU = 2**24  # a GPU needs more to be busy
_BLOCKS_KEPT = 4  # a longer sequence is computed again in the backward pass


def compute_rows(
    rule: "UpdateRule",
    tensors: dict[str, Tensor],
    state: Any,
    mask: Tensor | None,
    options: dict[str, Any],
    chunk_size: int,
) -> tuple[Tensor, Any]:
    """Compute the rows of a batch.

    Args:
        rule: the rule; it has a chunkwise form.
        tensors: q, k, v and gates, [B, T, ...].
        state: state before the first token.
        mask: True where a token counts [B, T], or None; for a rule that counts tokens False only at the end of rows.
        options: parameters and hyper-parameters.
        chunk_size: tokens per chunk.

    Returns:
        Output [B, T, H, V] in the dtype of v, and the state after the last token.
    """
    v = tensors["v"]
    batch, tokens, heads, value_dim = v.shape
    if tokens == 0:
        return torch.zeros_like(v), state
    chunk_size = _fitted(chunk_size, tokens)
    row_numbers = max(batch * heads * max(value_dim, tensors["q"].shape[-1]), 1)
    numbers = _BLOCK_NUMBERS if v.device.type == "cpu" else _BLOCK_NUMBERS_GPU
    block = max(numbers // row_numbers // chunk_size, 1) * chunk_size
    if mask is not None:
        tensors = tensors | {"mask": mask}
    if tokens > _BLOCKS_KEPT * block and torch.is_grad_enabled() and not rule.light_backward:
        return _compute_again(rule, tensors, state, options, chunk_size, block)
    if tokens <= block:
        output, state = _block(rule, tensors, state, options, chunk_size)
        return output.contiguous(), state
    whole, spans, tickets = fresh(v, v.shape), _spans(tokens, block), []
    blocks = zip(*(_split(tensor, block) for tensor in tensors.values()), strict=True)
    for span, parts in zip(spans, blocks, strict=True):
        output, state = _block(rule, dict(zip(tensors, parts, strict=True)), state, options, chunk_size)
        tickets.append(_Written.apply(output, whole, span))
    return _Joined.apply(whole, spans, *tickets), state


def _fitted(chunk_size: int, tokens: int) -> int:
    """Return at most `chunk_size`, less where a short sequence would mostly fill up its last chunk."""
    chunk_size = max(min(chunk_size, -(-tokens // _SMALLEST_CHUNK) * _SMALLEST_CHUNK), 1)
    while chunk_size % (2 * _SMALLEST_CHUNK) == 0:
        filled, less = (-(-tokens // size) * size for size in (chunk_size, chunk_size // 2))
        if filled - less < _WORTHWHILE * filled:
            break
        chunk_size //= 2
    return chunk_size


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


def _spans(tokens: int, block: int) -> list[slice]:
    """Return the tokens of every block."""
    return [slice(start, min(start + block, tokens)) for start in range(0, tokens, block)]


def _split(x: Tensor, block: int) -> tuple[Tensor, ...]:
    """Cut x [B, T, ...] into blocks whose gradients are written into one tensor as they come.

    The gradient of a slice fills a tensor of the size of x for every block, and that of `Tensor.split` holds all blocks
    until it can join them.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.split(block, dim=1)
    gradient = _Gradient(x, block)
    return tuple(
        _Part.apply(ticket, x.detach(), gradient, span)
        for ticket, span in zip(_Whole.apply(x, gradient), gradient.spans, strict=True)
    )


class _Gradient:
    """The gradient of one tensor, filled by its blocks and taken when all have been."""

    def __init__(self, x: Tensor, block: int) -> None:
        self.spans = _spans(x.shape[1], block)
        self._shape, self._like = x.shape, x.new_empty(0)
        self._values: Tensor | None = None
        self._written: list[slice] = []

    def write(self, span: slice, values: Tensor) -> None:
        """Write the gradient of one block."""
        if self._values is None:
            self._values = fresh(self._like, self._shape)
        self._values[:, span] = values
        self._written.append(span)

    def take(self) -> Tensor | None:
        """Return the gradient, and start anew."""
        values, written = self._values, self._written
        self._values, self._written = None, []
        if values is not None:
            for span in self.spans:
                if span not in written:
                    values[:, span] = 0.0
        return values


class _Whole(torch.autograd.Function):
    """Hand out an empty ticket per block; backward runs once the gradients of all tickets are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: _Gradient) -> tuple[Tensor, ...]:
        ctx.gradient = gradient
        return tuple(x.new_empty(0) for _ in gradient.spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, None]:
        return ctx.gradient.take(), None


class _Part(torch.autograd.Function):
    """Return a block of a tensor in exchange for its ticket."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, x: Tensor, gradient: _Gradient, span: slice) -> Tensor:
        ctx.gradient, ctx.span = gradient, span
        return x[:, span]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.gradient.write(ctx.span, grad)
        return grad.new_empty(0), None, None, None


class _Written(torch.autograd.Function):
    """Write a block of an output, and return a ticket of its shape that takes no memory."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Tensor, span: slice) -> Tensor:
        whole[:, span] = part
        return part.new_empty(1).expand_as(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Joined(torch.autograd.Function):
    """Return an output in exchange for the tickets of all its blocks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, spans: list[slice], *tickets: Tensor) -> Tensor:
        ctx.spans = spans
        return whole.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad[:, span] for span in ctx.spans)


def _extend(tensor: Tensor, missing: int, value: float) -> Tensor:
    """Append tokens of one value to [B, T, ...]."""
    return torch.cat([tensor, tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), value)], dim=1)


def _compute_again(
    rule: "UpdateRule",
    tensors: dict[str, Tensor],
    state: Any,
    options: dict[str, Any],
    chunk_size: int,
    block: int,
) -> tuple[Tensor, Any]:
    """Compute blocks so that the backward pass computes each again from its first state."""
    shared = {name: value for name, value in options.items() if isinstance(value, Tensor)}

    def run(parts: list[Tensor], start: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
        keywords = options | dict(zip(shared, parameters, strict=True))
        begun = start[0] if isinstance(state, Tensor) else type(state)(*start)
        output, after = _block(rule, dict(zip(tensors, parts, strict=True)), begun, keywords, chunk_size)
        return [output, *leaves(after)]

    counts = (len(tensors), len(leaves(state)), len(shared))
    output, *after = _Blocks.apply(run, block, counts, *tensors.values(), *leaves(state), *shared.values())
    return output, after[0] if isinstance(state, Tensor) else type(state)(*after)


class _Blocks(torch.autograd.Function):
    """A chain of blocks that keeps its inputs and every block's first state, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., list[Tensor]], block: int, counts: tuple[int, int, int], *arguments: Tensor
    ) -> tuple[Tensor, ...]:
        tensors, state, parameters = _sections(arguments, counts)
        whole, starts = None, []
        for span in _spans(tensors[0].shape[1], block):
            starts += state
            output, *state = run([x[:, span] for x in tensors], state, parameters)
            if whole is None:
                whole = fresh(output, torch.Size((output.shape[0], tensors[0].shape[1], *output.shape[2:])))
            whole[:, span] = output
        ctx.run, ctx.block, ctx.counts = run, block, counts
        ctx.save_for_backward(*arguments, *starts)
        state = [leaf.clone() for leaf in state]  # never one of the inputs
        ctx.mark_non_differentiable(*(leaf for leaf in state if not leaf.is_floating_point()))
        return whole, *state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *grad_after: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        number = sum(ctx.counts)
        tensors, state, parameters = _sections(saved[:number], ctx.counts)
        starts = [saved[at : at + len(state)] for at in range(number, len(saved), len(state))]
        of_tensors: list[Any] = [fresh(x, x.shape) if x.is_floating_point() else None for x in tensors]
        of_parameters: list[Any] = [torch.zeros_like(x) if x.is_floating_point() else None for x in parameters]
        of_state: list[Any] = list(grad_after)
        for n in range(len(starts) - 1, -1, -1):
            span = slice(n * ctx.block, (n + 1) * ctx.block)
            with torch.enable_grad():
                parts, start, shared = (
                    [_leaf(x) for x in xs] for xs in ([x[:, span] for x in tensors], starts[n], parameters)
                )
                results = ctx.run(parts, start, shared)
            pairs = zip(results, (grad_output[:, span], *of_state), strict=True)
            differentiable = [(x, gradient) for x, gradient in pairs if x.requires_grad]
            wanted = [x for x in (*parts, *start, *shared) if x.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [x for x, _ in differentiable],
                    wanted,
                    [gradient for _, gradient in differentiable],
                    materialize_grads=True,
                )
            )
            for x, gradient in zip(parts, of_tensors, strict=True):
                if x.requires_grad:
                    gradient[:, span] = next(found)
            of_state = [
                next(found) if x.requires_grad else gradient for x, gradient in zip(start, of_state, strict=True)
            ]
            for x, gradient in zip(shared, of_parameters, strict=True):
                if x.requires_grad:
                    gradient += next(found)
        of_state = [g if x.is_floating_point() else None for x, g in zip(state, of_state, strict=True)]
        return None, None, None, *of_tensors, *of_state, *of_parameters


def _sections(values: Any, counts: tuple[int, int, int]) -> tuple[list[Any], list[Any], list[Any]]:
    """Split what is given per token, the state, and the parameters."""
    first, second = counts[0], counts[0] + counts[1]
    return list(values[:first]), list(values[first:second]), list(values[second:])


def _leaf(x: Tensor) -> Tensor:
    """Return x as the start of a graph of its own."""
    return x.detach().requires_grad_(x.is_floating_point())
