"""Short causal convolution over the tokens of each sequence, with what it needs of earlier tokens as a value."""

import math

import torch
from torch import Tensor, nn


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
        y = self._slide(extended, tokens)
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
        before = self.size - 1
        sequences, tokens = tail.shape[0], x.shape[1]
        number = torch.arange(sequences, device=x.device)
        place = torch.arange(tokens, device=x.device)
        # Every sequence gets its tail in front of it; `place` is where a token stands then.
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)
        place = place + (sequence + 1) * before
        front = cu_seqlens[:-1, None] + number[:, None] * before + torch.arange(before, device=x.device)
        order = torch.cat([front.flatten(), place]).argsort()
        extended = torch.cat([tail.flatten(0, 1), x[0]]).index_select(0, order)[None]
        y = self._slide(extended, extended.shape[1] - before)[:, place - before]
        ends = cu_seqlens[1:, None] + number[:, None] * before + torch.arange(before, device=x.device)
        return y, extended[0, ends]

    def _slide(self, extended: Tensor, tokens: int) -> Tensor:
        """Add up the shifted tokens [B, tokens + size - 1, D], each times its weight."""
        weight = self.weight.to(extended.dtype)
        y = extended[:, :tokens] * weight[:, 0]
        for shift in range(1, self.size):
            y = torch.addcmul(y, extended[:, shift : shift + tokens], weight[:, shift])
        return y if self.bias is None else y + self.bias.to(extended.dtype)
