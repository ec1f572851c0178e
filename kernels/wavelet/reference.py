"""One-dimensional orthogonal wavelets, batched over everything but time (section 2 for the Haar patcher).

A transform of n levels works on whole blocks of 2^n frames: the signal is extended to a multiple of 2^n first
(``extension``), and every filter of 2 or more pairs of taps wraps around the ends of the extended signal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SQRT_HALF = 0.7071067811865476
SCALING: dict[str, tuple[float, ...]] = {
    "haar": (SQRT_HALF, SQRT_HALF),
    "db2": (0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037),
    "db3": (
        0.33267055295008263,
        0.8068915093110925,
        0.45987750211849154,
        -0.13501102001025458,
        -0.08544127388202666,
        0.03522629188570953,
    ),
    "db4": (
        0.2303778133088965,
        0.7148465705529157,
        0.6308807679298589,
        -0.027983769416859854,
        -0.18703481171909309,
        0.030841381835560764,
        0.0328830116668852,
        -0.010597401785069032,
    ),
}
"""Scaling filters h of unit norm (Daubechies 1988, extremal phase); the wavelet's is (-1)^k h[L-1-k]."""


def extension(length: int, levels: int, mode: str) -> list[int]:
    """The frames that stand for those from ``length`` to the next multiple of 2^levels.

    "periodic" repeats the last frame. "reflect" mirrors at each level that finds an odd number of values: x_T := x_{T-2}
    (a single value repeats).
    """
    if mode == "periodic":
        return [length - 1] * (-length % 2**levels)
    frames = list(range(length))
    for unit in (2**level for level in range(levels)):
        if len(frames) // unit % 2:
            frames += frames[-2 * unit : -unit] or frames[-unit:]
    return frames[length:]


def _wrap(x: Tensor, side: int) -> Tensor:
    """``side`` more frames before and after ``x [B, T, C]``, taken from its other end."""
    length = x.shape[1]
    return x[:, torch.arange(-side, length + side, device=x.device) % length]


def wavelet_filter(h: Sequence[float]) -> list[float]:
    return [(-1) ** k * tap for k, tap in enumerate(reversed(h))]


def _analysis(x: Tensor, h: Sequence[float], gain: float) -> tuple[Tensor, Tensor]:
    """low[i] = sum_k h[k] x[2i + k + 1 - L/2], high likewise, each ``[B, T / 2, C]``, of ``x [B, T, C]``, T even."""
    if len(h) == 2:
        even, odd = x[:, 0::2], x[:, 1::2]
        return (even + odd) * (h[0] * gain), (even - odd) * (h[0] * gain)
    x, span = _wrap(x, len(h) // 2 - 1), x.shape[1] - 1
    columns = [x[:, k : k + span : 2] for k in range(len(h))]
    filters = ([tap * gain for tap in taps] for taps in (h, wavelet_filter(h)))
    low, high = (sum(column * tap for column, tap in zip(columns, taps, strict=True)) for taps in filters)
    return low, high  # type: ignore[return-value]


def _synthesis(low: Tensor, high: Tensor, h: Sequence[float], gain: float) -> Tensor:
    """The transpose of ``_analysis`` at gain 1: two ``[B, n, C]`` to ``[B, 2 n, C]``."""
    if len(h) == 2:
        return torch.stack((low + high, low - high), dim=2).flatten(1, 2) * (h[0] * gain)
    length, lead, side = low.shape[1], len(h) // 2 - 1, len(h) // 4
    low, high = _wrap(low, side), _wrap(high, side)
    phases = []
    for phase in (0, 1):
        total = torch.zeros_like(low[:, :length])
        for k in range((phase + lead) % 2, len(h), 2):
            at = side + (phase + lead - k) // 2
            total = (
                total
                + low[:, at : at + length] * (h[k] * gain)
                + high[:, at : at + length] * (wavelet_filter(h)[k] * gain)
            )
        phases.append(total)
    return torch.stack(phases, dim=2).flatten(1, 2)


def dwt(x: Tensor, levels: int, wavelet: str, mode: str, gain: float, tree: str, channels_last: bool) -> Tensor:
    """``kinetok.kernels.dwt`` with its scale as a number: each level's orthonormal filters times ``gain``."""
    dtype, h = x.dtype, SCALING[wavelet]
    x = (x if channels_last else x.transpose(1, 2)).to(torch.promote_types(dtype, torch.float32))
    tail = extension(x.shape[1], levels, mode)
    if tail:
        x = torch.cat((x, x[:, tail]), dim=1)
    details: list[Tensor] = []
    for _ in range(levels if x.shape[1] else 0):
        low, high = _analysis(x, h, gain)
        if tree == "packet":
            x = torch.cat((low, high), dim=2)
        else:
            x, details = low, [high, *details]
    if not x.shape[1]:
        x = x.new_empty(x.shape[0], 0, x.shape[2] * (2**levels if tree == "packet" else 1))
    x = torch.cat((x, *details), dim=1) if details else x
    return (x if channels_last else x.transpose(1, 2).contiguous()).to(dtype)


def idwt(y: Tensor, levels: int, wavelet: str, gain: float, tree: str, channels_last: bool) -> Tensor:
    """``kinetok.kernels.idwt`` with its scale as a number: each level's orthonormal filters times ``gain``."""
    dtype, h = y.dtype, SCALING[wavelet]
    y = (y if channels_last else y.transpose(1, 2)).to(torch.promote_types(dtype, torch.float32))
    if tree == "packet":
        for _ in range(levels):
            low, high = y.chunk(2, dim=2)
            y = _synthesis(low, high, h, gain) if y.shape[1] else low
    elif y.shape[1]:
        bands = list(y.split([y.shape[1] >> levels, *(y.shape[1] >> level for level in range(levels, 0, -1))], dim=1))
        y = bands.pop(0)
        for high in bands:
            y = _synthesis(y, high, h, gain)
    else:
        y = y.clone()
    return (y if channels_last else y.transpose(1, 2).contiguous()).to(dtype)
