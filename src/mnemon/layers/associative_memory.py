"""The associative memory of one block of ARMT: a matrix written by the delta rule and read by linear attention."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemon.layers.lean_gradients import stretched_sigmoid
from mnemon.layers.memory_bank import state_dtype

_EPS = 1e-5  # of both denominators, as published; a memory that holds nothing answers 0


class Association(NamedTuple):
    """What the memory of one block holds.

    Attributes:
        matrix: A, [B, D, F].
        normaliser: z, [B, F].
    """

    matrix: Tensor
    normaliser: Tensor


def dpfp(x: Tensor, order: int) -> Tensor:
    """Map keys to non-negative features (deterministic parameter-free projection).

        r = [relu(x) ; relu(-x)];   phi(x) = [r * roll(r, 1) ; ... ; r * roll(r, order)]

    Args:
        x: keys or queries, [..., K].
        order: nu, rolled copies; at least 1.
    Returns:
        Features [..., 2 * order * K].
    Source:
        Linear Transformers Are Secretly Fast Weight Programmers, arXiv:2102.11174, section 5.3.
    """
    halves = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
    return torch.cat([halves * halves.roll(shift, dims=-1) for shift in range(1, order + 1)], dim=-1)


class AssociativeMemory(nn.Module):
    """Read and write the associations of one block.

    Args:
        hidden_size: model width D.
        key_dim: width K of queries and keys before the feature map.
        feature_order: nu of the feature map; F = 2 nu K features.
        gate_stretch: epsilon of the write strength, clamp((1 + 2 epsilon) sigmoid(.) - epsilon, 0, 1): above 0 a token
            can leave the matrix exactly as it is. 0 = as published.
    Source:
        Associative Recurrent Memory Transformer, arXiv:2407.04841.
    """

    def __init__(self, hidden_size: int, key_dim: int, feature_order: int, gate_stretch: float = 0.0) -> None:
        super().__init__()
        self.gate_stretch = gate_stretch
        self.feature_order = feature_order
        self.query = nn.Linear(hidden_size, key_dim, bias=False)
        self.key = nn.Linear(hidden_size, key_dim, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.write_strength = nn.Linear(hidden_size, 1)

    def initial_values(self) -> list[tuple[Tensor, Tensor]]:
        """Return parameters with their initial values; the model's `_init_weights` copies them in.

        Values start at zero, so that a new memory stays empty and adds nothing; the other projections are normal with
        standard deviation 1/sqrt(fan in).
        """
        values: list[tuple[Tensor, Tensor]] = [
            (linear.weight, torch.randn_like(linear.weight) / math.sqrt(linear.in_features))
            for linear in (self.query, self.key, self.write_strength)
        ]
        values.append((self.write_strength.bias, torch.zeros_like(self.write_strength.bias)))
        return [*values, (self.value.weight, torch.zeros_like(self.value.weight))]

    def empty(self, batch_size: int) -> Association:
        """Return a memory that holds nothing, float32 (float64 in a float64 model)."""
        like = self.value.weight
        features = 2 * self.feature_order * self.key.out_features
        dtype = state_dtype(like.dtype)
        return Association(
            like.new_zeros((), dtype=dtype).expand(batch_size, like.shape[0], features),
            like.new_zeros((), dtype=dtype).expand(batch_size, features),
        )

    def read(self, x: Tensor, held: Association) -> Tensor:
        """Answer every position of a block's input.

            y = A phi(W_Q x) / (z^T phi(W_Q x) + eps)

        Args:
            x: input of the block, [B, T, D].
            held: what the memory holds.
        Returns:
            What is added to the input, [B, T, D] in the dtype of x; zeros where the memory holds nothing.
        """
        features = self._features(self.query, x, held)
        with torch.autocast(x.device.type, enabled=False):
            return _recall(features, held).to(x.dtype)

    def write(self, tokens: Tensor, held: Association) -> Association:
        """Write the memory tokens of a complete segment, all of them against what the memory held before.

            v' = A phi(k) / (z^T phi(k) + eps);   gamma = clip(1 - z^T phi(k) / (|phi(k)|^2 + eps), 0, 1)
            A <- A + sum_i beta_i (v_i - v'_i) phi(k_i)^T;   z <- z + sum_i gamma_i phi(k_i)

        with k = W_K m, v = W_V m, beta = sigmoid(W_beta m + b), stretched by `gate_stretch`. No gradient flows through
        gamma.

        Args:
            tokens: output of the block at the memory tokens, [B, m, D].
            held: what the memory held in the segment.
        Returns:
            What it holds in the next one.
        """
        dtype = held.matrix.dtype
        features = self._features(self.key, tokens, held)
        values = self.value(tokens).to(dtype)
        strength = stretched_sigmoid(self.write_strength(tokens).to(dtype), self.gate_stretch)
        with torch.autocast(tokens.device.type, enabled=False):
            error = strength * (values - _recall(features, held))
            with torch.no_grad():
                known = torch.einsum("bmf,bf->bm", features, held.normaliser)
                new = (1 - known / (features.square().sum(-1) + _EPS)).clamp(0, 1)
            matrix = held.matrix + torch.einsum("bmd,bmf->bdf", error, features)
            normaliser = held.normaliser + torch.einsum("bm,bmf->bf", new, features)
        return Association(matrix, normaliser)

    def _features(self, projection: nn.Linear, x: Tensor, held: Association) -> Tensor:
        """Return the features [B, T, F] of projected positions, in the dtype of the state."""
        return dpfp(projection(x).to(held.matrix.dtype), self.feature_order)


def _recall(features: Tensor, held: Association) -> Tensor:
    """Return what features [B, T, F] recall, [B, T, D]."""
    weight = torch.einsum("btf,bf->bt", features, held.normaliser) + _EPS
    return torch.einsum("btf,bdf->btd", features, held.matrix) / weight[..., None]
