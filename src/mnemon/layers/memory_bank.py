"""The LM2 memory bank of one decoder block: cross-attention read, gated write.

Shapes: `B` batch, `T` tokens, `D` model width, `J` slots, `W` slot width, `H` memory heads, `d = W / H`.

A block *reads* the bank that stood when the segment began and *gathers* what its tokens would write. The bank itself
changes only when a segment is complete (`MemoryBank.update`). Everything is functional: state comes in as tensors and
goes out as tensors; nothing that changes during a forward pass lives on a module. How tokens are cut into segments is
the model's business (`mnemon.models.segments`).

Source: LM2: Large Memory Models, arXiv:2502.06049, equations 1-6, made causal and shape-consistent (docs/lm2.md lists
every departure and why).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemon.layers.convolution import ShortConvolution
from mnemon.layers.lean_gradients import (
    content_of,
    gated_projection,
    gated_update,
    normed_projections,
    stretched_sigmoid,
    write_scores,
    write_weights,
    written_content,
)

# Peak of the scores before the first token. Finite, so that it needs no special case.
_NEVER = -1e30
_INITIAL_SHARE = 0.9  # of a slot that takes part in an update, where it may also skip it
_INITIAL_SLOPES = (0.0, 0.05, 0.2, 0.6)
RMS_EPS = 1e-6


class WriteStatistics(NamedTuple):
    """Online softmax of the write attention over the tokens of an unfinished segment.

    Attributes:
        peak: running maximum of the scores, [B, H, J]; carries no gradient (a softmax does not depend on it).
        total: running sum of exp(score - peak), [B, H, J].
        value: running sum of exp(score - peak) times the value, [B, H, J, d].
        tail: keys and values that the convolution of the write still needs, [B, tokens - 1, 2 W]; None without one.
    """

    peak: Tensor
    total: Tensor
    value: Tensor
    tail: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in order."""
        return tuple(part for part in self if part is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> "WriteStatistics":
        """Return statistics whose tensors went through a function."""
        tail = None if self.tail is None else function(self.tail)
        return WriteStatistics(function(self.peak), function(self.total), function(self.value), tail)


class SegmentRead(NamedTuple):
    """What a block needs of the segment-start bank, [B, H, J, d] each.

    Attributes:
        keys: read keys.
        values: read values.
        write_queries: queries of the slots divided by sqrt(d): scaling J slots is cheaper than scaling J x T scores.
    """

    keys: Tensor
    values: Tensor
    write_queries: Tensor


class ReadResult(NamedTuple):
    """What tokens got from the bank.

    Attributes:
        term: memory term (g_out * E_mem) W_O, [B, T, D].
        weights: read weights, [B, H, T, J], or None.
        output_gate: g_out, [B, T, W].
    """

    term: Tensor
    weights: Tensor | None
    output_gate: Tensor


class GateValues(NamedTuple):
    """Gates of one bank update.

    Attributes:
        input_gate: [B, J, W], in [0, 1].
        forget_gate: [B, J, W], in [0, 1].
        rate: how much every slot takes part, before the gate is stretched, [B, J, 1]; None without a skip gate.
    """

    input_gate: Tensor
    forget_gate: Tensor
    rate: Tensor | None = None


def initial_bank(num_slots: int, slot_dim: int) -> Tensor:
    """Build the bank every sequence starts from, float32 [J, W].

    Rows of the identity (the paper's choice). For J > W the further rows are a fixed, deterministic set of distinct
    unit vectors (cosines of incommensurable frequencies), because an identity matrix has only W distinct rows.
    """
    bank = torch.zeros(num_slots, slot_dim)
    diagonal = min(num_slots, slot_dim)
    bank[range(diagonal), range(diagonal)] = 1.0
    if num_slots > slot_dim:
        row = torch.arange(1, num_slots - slot_dim + 1, dtype=torch.float64)[:, None]
        column = torch.arange(1, slot_dim + 1, dtype=torch.float64)[None, :]
        wave = torch.cos(row * column * math.sqrt(2) + row * math.sqrt(3))
        bank[slot_dim:] = F.normalize(wave, dim=-1).float()
    return bank


def rms_normalise(bank: Tensor) -> Tensor:
    """Scale every slot of `bank` [..., W] to unit root mean square."""
    return bank * torch.rsqrt(bank.square().mean(dim=-1, keepdim=True) + RMS_EPS)


def _logit(gate: float, stretch: float) -> float:
    """Return what a stretched sigmoid maps to `gate`."""
    unstretched = (gate + stretch) / (1 + 2 * stretch)
    return math.log(unstretched / (1 - unstretched))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype gates, statistics and bank are kept in: float64 for float64 models, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class BankProjection(nn.Linear):
    """A linear layer whose initial values are its bank's business (`MemoryBank.initial_values`)."""


class WriteConvolution(ShortConvolution):
    """The convolution of what is written; it begins as none."""

    def initial_values(self) -> list[tuple[Tensor, Tensor]]:
        """Return the weight with its initial value: a token is what it is."""
        weight = torch.zeros_like(self.weight)
        weight[:, -1] = 1.0
        return [(self.weight, weight)]


class MemoryBank(nn.Module):
    """Read and write one bank of J slots of width W from a block of width D.

    Args:
        hidden_size: model width D.
        num_slots: slots J.
        slot_dim: slot width W, divisible by `num_heads`.
        num_heads: memory heads H.
        retention: share of the bank one update keeps at initialisation, in (0, 1); sets the forget gate's bias.
        gate_stretch: epsilon of the input and forget gates, clamp((1 + 2 epsilon) sigmoid(.) - epsilon, 0, 1): above 0
            they can close and open completely, so that a segment can leave the bank exactly as it is. 0 = sigmoid.
        skip_gate: whether every slot has one more gate, a number per update, that closes input and opens forget gate at
            once, so that a segment can pass it by. Its stretch is the gates' own.
        coupled_gates: whether the input gate is 1 - forget gate, so that a slot takes in as much as it forgets.
        write_query: what a slot asks the tokens for: "both" its content and its key, "bank" its content alone, "key"
            its key alone.
        write_conv: tokens that a causal convolution over the written keys and values sees, none beyond the segment's
            first; 0 = no convolution.
        read_top_k: number of slots a token may read per head, None = all.
        initial_output: what the output projection's initial weights are multiplied by; 0 = a fresh memory adds nothing
            to the residual stream.
        norm_eps: epsilon of the memory's own RMS norm.
    """

    slot_key: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_slots: int,
        slot_dim: int,
        num_heads: int,
        retention: float,
        gate_stretch: float = 0.0,
        skip_gate: bool = False,
        coupled_gates: bool = False,
        write_query: str = "both",
        write_conv: int = 0,
        read_top_k: int | None = None,
        initial_output: float = 1.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads, self.slot_dim = num_heads, slot_dim
        self.head_dim = slot_dim // num_heads
        self.scale = 1 / math.sqrt(self.head_dim)
        # Recomputing instead of keeping costs a little time; it pays where the kept tensors are as wide as the model.
        self.recomputes = 2 * slot_dim > hidden_size
        self.gate_stretch = gate_stretch
        # A slot that takes part with a share s forgets s (1 - f) of its content.
        takes_part = max(_INITIAL_SHARE, 1 - retention / 2) if skip_gate else 1.0
        self.forget_bias = _logit(1 - (1 - retention) / takes_part, gate_stretch)
        self.skip_bias = _logit(takes_part, gate_stretch) if skip_gate else None
        self.read_top_k = read_top_k
        self.initial_output = initial_output
        self.norm_eps = norm_eps
        self.read_query = BankProjection(hidden_size, slot_dim, bias=False)
        self.read_key = BankProjection(slot_dim, slot_dim, bias=False)
        self.read_value = BankProjection(slot_dim, slot_dim, bias=False)
        self.output_gate = BankProjection(slot_dim, slot_dim)
        self.output = BankProjection(slot_dim, hidden_size, bias=False)
        self.write_norm = nn.Parameter(torch.ones(hidden_size))
        # Fixed, not learned: it only has to tell the slots apart, and J x W more parameters per block tell no more.
        self.register_buffer("slot_key", torch.empty(num_slots, slot_dim))
        self.has_slot_key = write_query != "bank"
        self.write_query = BankProjection(slot_dim, slot_dim, bias=False) if write_query != "key" else None
        self.write_key = BankProjection(hidden_size, slot_dim, bias=False)
        self.write_value = BankProjection(hidden_size, slot_dim, bias=False)
        self.write_conv = WriteConvolution(2 * slot_dim, write_conv) if write_conv else None
        self.recency_slope = nn.Parameter(torch.empty(num_heads))
        self.input_gate = BankProjection(slot_dim, slot_dim) if not coupled_gates else None
        self.forget_gate = BankProjection(slot_dim, slot_dim)
        self.forget_gate_bank = BankProjection(slot_dim, slot_dim, bias=False)
        self.skip_gate = BankProjection(slot_dim, 1) if skip_gate else None

    @property
    def is_plain(self) -> bool:
        """Whether it is the paper's bank, and nothing has wrapped its projections (PEFT does)."""
        plain = self.skip_gate is None and None not in (self.input_gate, self.write_query) and self.has_slot_key
        return plain and all(isinstance(child, BankProjection) for child in self.children())

    def initial_values(self) -> list[tuple[Tensor, Tensor]]:
        """Return parameters and slot keys with their initial values; the model's `_init_weights` copies them in.

        Projections are normal with standard deviation 1/sqrt(fan in), the output's times `initial_output`. The gate
        projections start at zero, so that at initialisation every forget gate is the same number and `retention` means
        what it says.
        """
        values: list[tuple[Tensor, Tensor]] = [(self.write_norm, torch.ones_like(self.write_norm))]
        for linear in (
            self.read_query, self.read_key, self.read_value, self.output,
            self.write_query, self.write_key, self.write_value,
        ):  # fmt: skip
            if linear is not None:
                value = torch.randn_like(linear.weight) / math.sqrt(linear.in_features)
                values.append((linear.weight, self.initial_output * value if linear is self.output else value))
        if self.write_conv is not None:
            values += self.write_conv.initial_values()
        for gate, bias in (
            (self.output_gate, 0.0), (self.input_gate, 0.0), (self.forget_gate, self.forget_bias),
            (self.forget_gate_bank, None), (self.skip_gate, self.skip_bias),
        ):  # fmt: skip
            if gate is not None:
                values.append((gate.weight, torch.zeros_like(gate.weight)))
                if bias is not None:
                    values.append((gate.bias, torch.full_like(gate.bias, bias)))
        values.append((self.slot_key, torch.randn_like(self.slot_key)))
        slopes = [_INITIAL_SLOPES[head % len(_INITIAL_SLOPES)] for head in range(self.num_heads)]
        values.append((self.recency_slope, torch.tensor(slopes).to(self.recency_slope)))
        return values

    def open_segment(self, normalised: Tensor) -> SegmentRead:
        """Project the segment-start bank, RMS-normalised, [B, J, W], once for all tokens of the segment."""
        normalised = normalised.to(self.read_key.weight.dtype)
        if self.write_query is None:
            asked = self.slot_key.expand(len(normalised), -1, -1)
        else:
            asked = self.write_query(normalised)
            asked = asked + self.slot_key if self.has_slot_key else asked
        return SegmentRead(
            self._heads(self.read_key(normalised)),
            self._heads(self.read_value(normalised)),
            self._heads(asked * self.scale),
        )

    def read(
        self, x: Tensor, segment: SegmentRead, wants_weights: bool = False, queries: Tensor | None = None
    ) -> ReadResult:
        """Read the bank for every token.

            E_mem = softmax(x W_Q (M W_K)^T / sqrt(d)) M W_V;   g_out = sigmoid(E_mem W_out + b_out)

        Args:
            x: the block's normalised input, [B, T, D].
            segment: projections of the segment-start bank.
            wants_weights: whether to return the read weights.
            queries: what `read_queries` returns for x, where it is known already.
        Returns:
            Memory term, read weights (None unless they were wanted or computed) and output gate.
        Source:
            arXiv:2502.06049, equations 1-3, with multiple heads.
        """
        queries = self.read_queries(x) if queries is None else queries
        weights = None
        if wants_weights or self.read_top_k is not None:
            weights = self.read_weights(queries, segment)
            retrieved = self._merge(weights @ segment.values)
        else:  # the library's fused attention keeps no weights for the backward pass
            keys, values = (part.expand(len(x), -1, -1, -1) for part in (segment.keys, segment.values))
            retrieved = self._merge(F.scaled_dot_product_attention(queries, keys, values, scale=self.scale))
        gate = torch.sigmoid(self.output_gate(retrieved))
        term = (
            gated_projection(gate, retrieved, self.output.weight) if self.recomputes else self.output(gate * retrieved)
        )
        return ReadResult(term, weights, gate)

    def read_queries(self, x: Tensor) -> Tensor:
        """Return what tokens ask for, [B, H, T, d], from the block's normalised input [B, T, D]."""
        return self._heads(self.read_query(x))

    def read_weights(self, queries: Tensor, segment: SegmentRead) -> Tensor:
        """Return how queries [B, H, T, d] share their reads among the slots of a bank, [B, H, T, J]."""
        scores = queries @ segment.keys.transpose(-1, -2) * self.scale
        if self.read_top_k is not None and self.read_top_k < scores.shape[-1]:
            threshold = scores.topk(self.read_top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < threshold, float("-inf"))
        return scores.softmax(dim=-1)

    def empty_statistics(self, batch_size: int, like: Tensor) -> WriteStatistics:
        """Return the statistics of a segment without tokens, on the device of `like` and in the state's dtype."""
        num_slots = self.slot_key.shape[0]
        shape = (batch_size, self.num_heads, num_slots)
        dtype = state_dtype(like.dtype)
        # One number each, seen as many: nothing is written in place, and most segments are gathered in one go.
        never, zero = like.new_full((), _NEVER, dtype=dtype), like.new_zeros((), dtype=dtype)
        tail = None if self.write_conv is None else zero.expand(batch_size, self.write_conv.size - 1, 2 * self.slot_dim)
        return WriteStatistics(never.expand(shape), zero.expand(shape), zero.expand(*shape, self.head_dim), tail)

    def gather(
        self,
        residual: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        segment: SegmentRead,
        past: WriteStatistics,
        is_fresh: bool = False,
    ) -> WriteStatistics:
        """Add tokens to the write statistics of the running segment.

        Args:
            residual: h + SelfAttn + memory term of the block, [B, T, D].
            positions: index of each token inside its segment, [B, T] or [1, T], 0 ... C-1.
            valid: True where a token is real, [B, T]; None = all. Other tokens leave the statistics unchanged; with a
                convolution they stand behind those that are real.
            segment: projections of the segment-start bank (whose slots are the queries).
            past: statistics of the segment's earlier tokens.
            is_fresh: whether it is known that there are none.
        Returns:
            The new statistics, in the state's dtype.
        """
        keys, values, tail = self._written_projections(residual, valid, past)
        # ALiBi form: a later fact about the same thing counts more. The constant -slope * (segment end) is left out,
        # because a softmax does not see it and the end is not known while decoding.
        peak, total, value = written_content(
            segment.write_queries, keys, values, self.recency_slope, positions, valid, past.peak
        )
        if is_fresh:
            return WriteStatistics(peak, total, value, tail)
        rescale = torch.exp(past.peak - peak)
        return WriteStatistics(peak, past.total * rescale + total, past.value * rescale[..., None] + value, tail)

    def write_shares(
        self,
        residual: Tensor,
        positions: Tensor,
        segment: SegmentRead,
        past: WriteStatistics,
        statistics: WriteStatistics,
    ) -> Tensor:
        """Return which share of every slot's write attention falls on each token.

            share_jt = exp(s_jt - peak_j) / total_j

        Args:
            residual: as in `gather`, [B, T, D].
            positions: as in `gather`, [B, T] or [1, T].
            segment: projections of the segment-start bank.
            past: statistics of the segment's tokens before these.
            statistics: statistics over all tokens of the segment, those before included.
        Returns:
            Shares [B, H, J, T], in the state's dtype; they add up to 1 over the tokens of the segment.
        """
        keys, _, _ = self._written_projections(residual, None, past)
        dtype = statistics.peak.dtype
        scores = write_scores(
            segment.write_queries.to(dtype), keys.to(dtype), self.recency_slope.to(dtype), positions.to(dtype)
        )
        return write_weights(scores, statistics.peak) / statistics.total[..., None]

    def update(self, bank: Tensor, statistics: WriteStatistics) -> tuple[Tensor, GateValues]:
        """Apply the gated update of a complete segment.

            U = softmax(write scores) y W_V';   g_in = sigmoid(U W_in + b_in)
            g_forget = sigmoid(U W_f + M W_fm + b_f);   M <- g_in * tanh(U) + g_forget * M

        With coupled gates g_in is 1 - g_forget. With a skip gate s = sigmoid(U w_s + b_s), one number per slot, a share
        1 - s of every slot stays as it is: the gates are then s g_in and 1 - s (1 - g_forget).

        Args:
            bank: the running bank, [B, J, W] (in flow `depth` what the block before left).
            statistics: statistics over all tokens of the segment.
        Returns:
            The new bank [B, J, W] and the gates.
        Source:
            arXiv:2502.06049, equations 4-6, gates computed per slot from the slot's own new content; coupled gates are
            those of a gated recurrent unit, arXiv:1406.1078; the skip gate is our own.
        """
        total = statistics.total.clamp_min(torch.finfo(bank.dtype).tiny)
        written = self._merge(content_of(statistics.value, total))
        forget_gate = self._gate(
            _linear_in(bank.dtype, self.forget_gate, written)
            + _linear_in(bank.dtype, self.forget_gate_bank, rms_normalise(bank))
        )
        rate = None
        if self.input_gate is None:
            input_gate = 1 - forget_gate
        else:
            input_gate = self._gate(_linear_in(bank.dtype, self.input_gate, written))
        if self.skip_gate is not None:
            logits = _linear_in(bank.dtype, self.skip_gate, written)
            takes_part, rate = self._gate(logits), torch.sigmoid(logits)
            input_gate, forget_gate = takes_part * input_gate, 1 - takes_part * (1 - forget_gate)
        return gated_update(input_gate, written, forget_gate, bank), GateValues(input_gate, forget_gate, rate)

    def _written_projections(
        self, residual: Tensor, valid: Tensor | None, past: WriteStatistics
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys and values of tokens for writing, [B, H, T, d] each, and the tail of their convolution."""
        weights = (self.write_key.weight, self.write_value.weight)
        keys, values = normed_projections(residual, self.write_norm, self.norm_eps, *weights)
        tail = past.tail
        if self.write_conv is not None:
            assert tail is not None
            lengths = None if valid is None else valid.sum(dim=1)
            both, after = self.write_conv(torch.cat([keys, values], dim=-1), tail.to(keys.dtype), lengths)
            keys, values = both.chunk(2, dim=-1)
            tail = after.to(tail.dtype)
        return self._heads(keys), self._heads(values), tail

    def _gate(self, x: Tensor) -> Tensor:
        """Squash to [0, 1]; with a stretch, both ends are reached.

        Source: the hard concrete gate of Learning Sparse Neural Networks through L0 Regularization, arXiv:1712.01312,
        section 2.1, without its noise.
        """
        return stretched_sigmoid(x, self.gate_stretch)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, N, W] -> [B, H, N, d]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _merge(self, x: Tensor) -> Tensor:
        """[B, H, N, d] -> [B, N, W]."""
        return x.transpose(1, 2).flatten(-2)


def _linear_in(dtype: torch.dtype, linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply `linear` in `dtype`: gates and bank stay in float32 when the model runs, or is autocast, in bfloat16."""
    bias = None if linear.bias is None else linear.bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), linear.weight.to(dtype), bias)
