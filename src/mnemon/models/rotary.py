"""Move cached rotary keys to another position.

First tokens that stay visible (attention sinks) must keep a bounded distance from the tokens that read them, so their
cached keys are rotated on as the text grows. How a decoder rotates (which frequencies, which pairs of channels, which
part of the head, or not at all in some blocks) is found by experiment: one token is run at two positions, and the
rotation that explains the difference of its cached keys is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

_PROBE_SHIFT = 7
PROBE_POSITIONS = (0, _PROBE_SHIFT)


@dataclass(frozen=True)
class KeyRotation:
    """A rotary embedding of keys.

    Attributes:
        inverse_frequencies: radians per position, [rotated width / 2], float64 on the host; empty = no rotation,
            negative = in the other direction.
        interleaved: whether a pair is two neighbouring channels (else channel i and channel i + half).
        from_end: whether the rotated channels are the last of the head (else the first).
    """

    inverse_frequencies: np.ndarray
    interleaved: bool = False
    from_end: bool = False

    def __call__(self, keys: Tensor, shift: np.ndarray) -> Tensor:
        """Rotate cached keys [B, H, n, d] on by `shift` [B] positions; a shift of 0 leaves them bit for bit."""
        width = 2 * len(self.inverse_frequencies)
        if width == 0:
            return keys
        # In float64 on the host: float32 angles of a million positions would be off by hundredths of a radian.
        angle = np.remainder(shift[:, None] * self.inverse_frequencies[None, :], 2 * math.pi)
        dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
        cosine, sine = (
            torch.from_numpy(values).to(device=keys.device, dtype=dtype)[:, None, None, :]
            for values in (np.cos(angle), np.sin(angle))
        )
        split = keys.shape[-1] - width
        rotated, rest = (
            (keys[..., split:], keys[..., :split]) if self.from_end else (keys[..., :width], keys[..., width:])
        )
        rotated = rotated.to(dtype)
        if self.interleaved:
            one, two = rotated[..., 0::2], rotated[..., 1::2]
        else:
            one, two = rotated.chunk(2, dim=-1)
        turned = (one * cosine - two * sine, two * cosine + one * sine)
        joined = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
        joined = joined.to(keys.dtype)
        return torch.cat([rest, joined] if self.from_end else [joined, rest], dim=-1)


def find_rotation(before: Tensor, after: Tensor, candidates: Sequence[Tensor]) -> KeyRotation | None:
    """Find how keys are rotated from the same token's keys at the two `PROBE_POSITIONS`.

    Args:
        before: cached key at the first position, [1, H, 1, d].
        after: the same at the second.
        candidates: inverse frequencies the decoder may use.
    Returns:
        The rotation that leads from one to the other, or None if no known kind does.
    """
    # What the decoder computed in half precision is compared in float32, within that precision.
    tolerance = 4 * max(torch.finfo(before.dtype).eps, torch.finfo(torch.float32).eps) ** 0.75
    before, after = before.float(), after.float()
    limit = tolerance * float(before.abs().max())
    if float((before - after).abs().max()) <= limit:
        return KeyRotation(np.zeros(0))
    shift = np.array([float(_PROBE_SHIFT)])
    for frequencies, sign, interleaved, from_end in product(candidates, (1, -1), (False, True), (False, True)):
        if 2 * len(frequencies) > before.shape[-1]:
            continue
        rotation = KeyRotation(sign * frequencies.double().cpu().numpy(), interleaved, from_end)
        if float((rotation(before, shift) - after).abs().max()) <= limit:
            return rotation
    return None
