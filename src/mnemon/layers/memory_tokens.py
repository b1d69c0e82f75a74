"""Memory tokens: trained input embeddings that a decoder reads and writes like any others."""

import torch
from torch import Tensor, nn


class MemoryTokens(nn.Module):
    """Hold the embeddings of m memory tokens of width D.

    Args:
        num_tokens: memory tokens m.
        hidden_size: model width D.
    Source:
        Recurrent Memory Transformer, arXiv:2207.06881, section 3.
    """

    def __init__(self, num_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, hidden_size))

    def rows(self, batch_size: int) -> Tensor:
        """Return the same tokens for every row, [B, m, D]."""
        return self.weight.expand(batch_size, -1, -1)
