"""Steps of the memory with a backward pass written by hand, which recomputes what is cheap instead of keeping it.

Each is equal to a plain expression (given in its docstring and tested against it in float64); what differs is what
autograd keeps (never a number per token and slot, never a product of two tensors that are kept anyway) and how many
operations it takes. Like the rest of the bank they are pure functions, and they have no second derivative.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Lowest score below the peak. A weight of exp(-50) vanishes beside the peak's own even in float64; much fainter ones
# are subnormal numbers, on which a CPU computes many times slower (they doubled the time of the write).
_FAINTEST = -50.0
_NEVER = -1e30  # score of a token that does not count


def written_content(
    queries: Tensor, keys: Tensor, values: Tensor, slope: Tensor, positions: Tensor, valid: Tensor | None, floor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum values over tokens with exponential weights, relative to the largest score.

        s_jt = q_j . k_t + slope * position_t;   peak_j = max(floor_j, max_t s_jt)
        total_j = sum_t exp(s_jt - peak_j);   value_j = sum_t exp(s_jt - peak_j) v_t

    Args:
        queries: [B or 1, H, J, d].
        keys: [B, H, T, d].
        values: [B, H, T, d].
        slope: [H], added to the scores per position.
        positions: [B or 1, T].
        valid: True where a token counts, [B, T]; None = everywhere.
        floor: smallest peak, [B, H, J]; no gradient.
    Returns:
        peak [B, H, J] (no gradient), total [B, H, J], value [B, H, J, d], in the dtype of `floor`.
    """
    with torch.autocast(keys.device.type, enabled=False):
        dtype = floor.dtype
        parts = (queries.to(dtype), keys.to(dtype), values.to(dtype), slope.to(dtype), positions.to(dtype))
        found: tuple[Tensor, Tensor, Tensor] = _WrittenContent.apply(*parts, valid, floor)
        return found


class _WrittenContent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        slope: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        floor: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = write_scores(queries, keys, slope, positions, valid)
        peak = torch.maximum(floor, scores.amax(dim=-1))
        weights = write_weights(scores, peak, valid)
        ctx.save_for_backward(queries, keys, values, slope, positions, valid, peak)
        ctx.mark_non_differentiable(peak)
        return peak, weights.sum(dim=-1), weights @ values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, d_total: Tensor, d_value: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, slope, positions, valid, peak = ctx.saved_tensors
        with torch.autocast(keys.device.type, enabled=False):
            weights = write_weights(write_scores(queries, keys, slope, positions, valid), peak, valid)
            d_values = weights.transpose(-1, -2) @ d_value
            # d_scores = weights * (d_value . v + d_total), in place of the weights.
            d_scores = weights.mul_((d_value @ values.transpose(-1, -2)).add_(d_total[..., None]))
            d_queries = (d_scores @ keys).sum_to_size(queries.shape)
            d_keys = d_scores.transpose(-1, -2) @ queries
            d_slope = (d_scores.sum(dim=2) * positions[:, None, :]).sum(dim=(0, 2))
        return d_queries, d_keys, d_values, d_slope, None, None, None


def write_scores(
    queries: Tensor, keys: Tensor, slope: Tensor, positions: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Return the scores s_jt of `written_content` [B, H, J, T] for arguments of its shapes."""
    scores = queries @ keys.transpose(-1, -2)
    scores.add_((slope[None, :, None] * positions[:, None, :])[:, :, None, :])
    return scores if valid is None else scores.masked_fill_(~valid[:, None, None, :], _NEVER)


def write_weights(scores: Tensor, peak: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return exp(scores - peak), in place of the scores."""
    weights = scores.sub_(peak[..., None]).clamp_min_(_FAINTEST).exp_()
    return weights if valid is None else weights.mul_(valid[:, None, None, :])


def gated_projection(gate: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return (gate * x) weight^T without keeping the product; gate and x [..., W], weight [D, W]."""
    projected: Tensor = _GatedProjection.apply(gate, x, weight)
    return projected


class _GatedProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x, weight)
        return F.linear(gate * x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, x, weight = ctx.saved_tensors
        product = (gate * x).to(d_out.dtype)
        d_product = d_out @ weight.to(d_out.dtype)
        d_weight = d_out.flatten(0, -2).transpose(0, 1) @ product.flatten(0, -2)
        return d_product * x, d_product * gate, d_weight


def normed_projections(x: Tensor, scale: Tensor, eps: float, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return RMSNorm(x) one^T and RMSNorm(x) other^T without keeping the normalised x.

    Args:
        x: [..., D].
        scale: weight of the norm, [D].
        eps: epsilon of the norm.
        one: weight of the first projection, [W, D].
        other: weight of the second, [W, D].
    """
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
    steps = _FoldedProjections if exact else _NormedProjections
    projected: tuple[Tensor, Tensor] = steps.apply(x, scale, eps, one, other)
    return projected


class _FoldedProjections(torch.autograd.Function):
    """The norm as factors of rows and columns, so that no normalised x is ever written: r x (scale * W)^T, r = 1 / rms.

    Half precision normalises first: there the projections of an x that is not normalised may overflow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(eps).rsqrt_()
        found = [F.linear(x, scale * weight).mul_(inverse_rms) for weight in (one, other)]
        ctx.save_for_backward(x, scale, one, other, inverse_rms, *found)
        return found[0], found[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_found: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, one, other, inverse_rms, *found = ctx.saved_tensors
        rows = x.flatten(0, -2)
        # What of the gradient changes the length of x, which the norm takes away.
        along = sum((d * f).sum(dim=-1, keepdim=True) for d, f in zip(d_found, found, strict=True))
        along = (along * inverse_rms.square() / x.shape[-1]).flatten(0, -2)
        d_one, d_other = ((d * inverse_rms).flatten(0, -2) for d in d_found)
        d_x = torch.addmm(d_one @ (scale * one), d_other, scale * other).addcmul_(rows, along, value=-1)
        d_one, d_other = d_one.mT @ rows, d_other.mT @ rows
        d_scale = (d_one * one).sum(dim=0).add_((d_other * other).sum(dim=0))
        return d_x.view_as(x), d_scale, None, d_one.mul_(scale), d_other.mul_(scale)


class _NormedProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, scale, one, other)
        ctx.eps = eps
        y = F.rms_norm(x, x.shape[-1:], scale, eps)
        return F.linear(y, one), F.linear(y, other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_one: Tensor, d_other: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, one, other = ctx.saved_tensors
        with torch.enable_grad():
            x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_()
            y = F.rms_norm(x, x.shape[-1:], scale, ctx.eps)
        dtype = d_one.dtype
        d_y = torch.addmm(d_one.flatten(0, -2) @ one.to(dtype), d_other.flatten(0, -2), other.to(dtype)).view_as(y)
        flat = y.detach().flatten(0, -2).to(dtype)
        d_x, d_scale = torch.autograd.grad(y, (x, scale), d_y.to(y.dtype))
        return (
            d_x,
            d_scale,
            None,
            d_one.flatten(0, -2).transpose(0, 1) @ flat,
            d_other.flatten(0, -2).transpose(0, 1) @ flat,
        )


def content_of(value: Tensor, total: Tensor) -> Tensor:
    """Return value / total, keeping the quotient (which others keep anyway) and not the dividend.

    Args:
        value: [B, H, J, d].
        total: positive, [B, H, J].
    """
    quotient: Tensor = _Quotient.apply(value, total)
    return quotient


class _Quotient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, total: Tensor) -> Tensor:
        # Laid out as [B, J, H, d], so that joining the heads is a view and one tensor serves all who keep it.
        quotient = (value / total[..., None]).transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(quotient, total)
        return quotient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_quotient: Tensor) -> tuple[Tensor, Tensor]:
        quotient, total = ctx.saved_tensors
        d_value = d_quotient / total[..., None]
        return d_value, -(d_value * quotient).sum(dim=-1)


def gated_update(input_gate: Tensor, content: Tensor, forget_gate: Tensor, bank: Tensor) -> Tensor:
    """Return input_gate * tanh(content) + forget_gate * bank without keeping the tanh; all [B, J, W]."""
    updated: Tensor = _GatedUpdate.apply(input_gate, content, forget_gate, bank)
    return updated


class _GatedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_gate: Tensor, content: Tensor, forget_gate: Tensor, bank: Tensor) -> Tensor:
        ctx.save_for_backward(input_gate, content, forget_gate, bank)
        return torch.addcmul(forget_gate * bank, input_gate, torch.tanh(content))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_updated: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        input_gate, content, forget_gate, bank = ctx.saved_tensors
        squashed = torch.tanh(content)
        d_content = d_updated * input_gate * (1 - squashed.square())
        return d_updated * squashed, d_content, d_updated * bank, d_updated * forget_gate


def stretched_sigmoid(x: Tensor, stretch: float) -> Tensor:
    """Return clamp((1 + 2 stretch) sigmoid(x) - stretch, 0, 1)."""
    return _stretched(torch.sigmoid(x), stretch)


def _stretched(gate: Tensor, stretch: float) -> Tensor:
    return gate if stretch == 0 else ((1 + 2 * stretch) * gate - stretch).clamp(0, 1)


def kept_bank(
    bank: Tensor, content_logits: Tensor, weight: Tensor, added: Tensor, stretch: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Let a bank forget, and add to it.

        f = stretched_sigmoid(content_logits + RMSNorm(bank) weight^T, stretch);   f * bank + added

    Args:
        bank: [B, J, W].
        content_logits: [B, J, W].
        weight: [W, W].
        added: [B, J, W].
        stretch: of the gate.
        eps: epsilon of the norm.
    Returns:
        The new bank and the gate f (no gradient), [B, J, W] each.
    """
    found: tuple[Tensor, Tensor] = _KeptBank.apply(bank, content_logits, weight, added, stretch, eps)
    return found


class _KeptBank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bank: Tensor, content_logits: Tensor, weight: Tensor, added: Tensor, stretch: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        inverse_rms = bank.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        squashed = F.linear(bank * inverse_rms, weight).add_(content_logits).sigmoid_()
        gate = _stretched(squashed, stretch)
        ctx.save_for_backward(bank, weight, inverse_rms, squashed)
        ctx.stretch = stretch
        ctx.mark_non_differentiable(gate)
        return torch.addcmul(added, gate, bank), gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_bank: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        bank, weight, inverse_rms, squashed = ctx.saved_tensors
        d_gate, gate = d_bank * bank, squashed
        if ctx.stretch:
            gate = _stretched(squashed, ctx.stretch)
            d_gate = d_gate.mul_(1 + 2 * ctx.stretch).mul_((gate > 0) & (gate < 1))  # closed or open: no gradient
        d_logits = torch.ops.aten.sigmoid_backward(d_gate, squashed)
        normed = bank * inverse_rms
        d_normed = d_logits @ weight
        # What of the gradient changes the length of a slot, which the norm takes away.
        along = (d_normed * normed).mean(dim=-1, keepdim=True)
        d_past = torch.addcmul(d_bank * gate, torch.addcmul(d_normed, along, normed, value=-1), inverse_rms)
        d_weight = d_logits.flatten(0, -2).mT @ normed.flatten(0, -2)
        return d_past, d_logits, d_weight, d_bank, None, None
