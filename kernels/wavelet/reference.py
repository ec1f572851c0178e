"""One-dimensional Haar wavelets by add and subtract, batched over everything but time (section 2)."""

from typing import Literal

import torch
from torch import Tensor

from kinetok.errors import UserError

Scale = Literal["patcher", "orthonormal"]
SQRT_HALF = 0.7071067811865476


def _factor(scale: Scale, forward: bool) -> float:
    if scale == "patcher":  # the patcher halves the orthonormal analysis and doubles the synthesis
        return SQRT_HALF / 2 if forward else SQRT_HALF * 2
    if scale == "orthonormal":
        return SQRT_HALF
    raise UserError(f"scale: expected 'patcher' or 'orthonormal', got {scale!r}")


def dwt(x: Tensor, levels: int, *, scale: Scale = "patcher", channels_last: bool = False) -> Tensor:
    """Haar packet transform of ``x [B, C, T]`` (``[B, T, C]`` with channels_last) to ``[B, C * 2^levels, T / 2^levels]``.

    Each level halves the time and doubles the channels, all lows before all highs, and the next level treats the
    whole result as its input. An odd length is extended by reflection: x_T := x_{T-2} (a single sample repeats).
    """
    factor = _factor(scale, forward=True)
    x = x if channels_last else x.transpose(1, 2)
    for _ in range(levels):
        if x.shape[1] % 2:
            x = torch.cat((x, x[:, -2:-1] if x.shape[1] > 1 else x), dim=1)
        even, odd = x[:, 0::2], x[:, 1::2]
        x = torch.cat((even + odd, even - odd), dim=2) * factor
    return x if channels_last else x.transpose(1, 2).contiguous()


def idwt(y: Tensor, levels: int, *, scale: Scale = "patcher", channels_last: bool = False) -> Tensor:
    """Inverse of ``dwt``: ``[B, C * 2^levels, n]`` to ``[B, C, n * 2^levels]`` (time second with channels_last)."""
    factor = _factor(scale, forward=False)
    y = y if channels_last else y.transpose(1, 2)
    if y.shape[2] % 2**levels:
        raise UserError(f"idwt: expected a multiple of {2**levels} channels for {levels} levels, got {y.shape[2]}")
    for _ in range(levels):
        low, high = y.chunk(2, dim=2)
        y = torch.stack((low + high, low - high), dim=2).flatten(1, 2) * factor
    return y if channels_last else y.transpose(1, 2).contiguous()
