"""Short causal convolution over the tokens of each sequence, with what it needs of earlier tokens as a value."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ShortConvolution(nn.Module):
    """Depthwise causal convolution: y_t = sum over j < size of w_j * x_{t-j} (+ b).

    Args:
        channels: channels D.
        size: tokens that one output sees, the token itself included.
        bias: whether there is a bias.
    """

    def __init__(self, channels: int, size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def initial_values(self) -> list[tuple[Tensor, Tensor]]:
        """Return every parameter with its initial value: weights uniform within 1/sqrt(size), no bias."""
        bound = 1 / math.sqrt(self.size)
        values: list[tuple[Tensor, Tensor]] = [(self.weight, (2 * torch.rand_like(self.weight) - 1) * bound)]
        return values if self.bias is None else [*values, (self.bias, torch.zeros_like(self.bias))]

    def forward(self, x: Tensor, tail: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve rows that continue from a tail.

        Args:
            x: tokens, [B, T, D]; in a row those that count come first.
            tail: the last size - 1 tokens before, oldest first, zeros before the first; [B, size - 1, D].
            lengths: tokens that count in each row, [B]; None = all.

        Returns:
            y [B, T, D] and the new tail.
        """
        tokens = x.shape[1]
        extended = torch.cat([tail, x], dim=1)
        y = self._slide(extended)[:, self.size - 1 :]
        if lengths is None:
            return y, extended[:, tokens:]
        index = lengths[:, None] + torch.arange(self.size - 1, device=x.device)
        return y, torch.take_along_dim(extended, index[..., None], dim=1)

    def packed(self, x: Tensor, tail: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve packed sequences, each from its own tail.

        Args:
            x: tokens of all sequences, [1, T, D].
            tail: the tails, [N, size - 1, D].
            cu_seqlens: boundaries of the sequences, [N + 1].

        Returns:
            y [1, T, D] and the new tails.
        """
        if x.shape[1] == 0:
            return x, tail
        before = self.size - 1
        # Only the first tokens of a sequence see its tail: they are convolved apart, the others as one stream.
        column = torch.arange(2 * before, device=x.device)
        starts, stops = cu_seqlens[:-1, None], cu_seqlens[1:, None]
        head = starts + column[:before]
        within = head < stops
        first = x[0].index_select(0, head.clamp(max=x.shape[1] - 1).flatten()).unflatten(0, head.shape)
        heads = self._slide(torch.cat([tail, first], dim=1))
        y = self._slide(x)[0].index_copy(0, head[within], heads[:, before:][within])
        # The new tail are the last tokens of the old tail followed by the sequence.
        last = stops - before + column[:before]
        recent = x[0].index_select(0, last.clamp(min=0).flatten()).unflatten(0, last.shape)
        older = torch.take_along_dim(tail, (last - starts + before).clamp(0, before - 1)[..., None], dim=1)
        return y[None], torch.where((last >= starts)[..., None], recent, older)

    def _slide(self, x: Tensor) -> Tensor:
        """Convolve rows [B, T, D] with zeros before the first token."""
        y: Tensor = _Slide.apply(x, self.weight.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _Slide(torch.autograd.Function):
    """y_t = sum over j of w_j x_{t-j}, w_0 the last column of the weight, zeros before the first token.

    The same as a sum of shifted tokens; autograd would keep one copy of the tokens for every shift, and fill as many
    with zeros on the way back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        size = weight.shape[1]
        y = x * weight[:, size - 1]
        for shift in range(1, min(size, x.shape[1])):
            y[:, shift:].addcmul_(x[:, :-shift], weight[:, size - 1 - shift])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        size = weight.shape[1]
        to_x, to_weight = None, None
        if ctx.needs_input_grad[0]:
            to_x = gradient * weight[:, size - 1]
            for shift in range(1, min(size, x.shape[1])):
                to_x[:, :-shift].addcmul_(gradient[:, shift:], weight[:, size - 1 - shift])
        if ctx.needs_input_grad[1]:
            to_weight = torch.zeros_like(weight)
            for shift in range(min(size, x.shape[1])):
                products = gradient[:, shift:] * x[:, : x.shape[1] - shift]
                to_weight[:, size - 1 - shift] = products.sum(dim=(0, 1))
        return to_x, to_weight
