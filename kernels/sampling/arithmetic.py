"""Logarithm and power of two from single-precision adds and multiplies only (docs/numerics.md).

A library's log differs in the last bit from machine to machine, and one bit can change a token.
"""

import torch
from torch import Tensor

LOG = (
    -0.4999999701976776,
    0.33333322405815125,
    -0.2500077188014984,
    0.2000196874141693,
    -0.1662759929895401,
    0.1418900042772293,
    -0.131016343832016,
    0.12821748852729797,
    -0.07866667956113815,
)
LN2_HIGH, LN2_LOW = 0.693359375, -2.1219444170128554e-04
SQRT_HALF_BITS = 0x3F3504F3
EXP2 = (
    1.0,
    0.6931469440460205,
    0.2402305006980896,
    0.05548042804002762,
    0.009684580378234386,
    0.0012387821916490793,
    0.00021877505059819669,
)
WEIGHT_BITS = 24
LOG2_E = 1.4426950216293335
LOWEST = -40.0


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def log_fp32(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal fp32 numbers, to 1e-7 relative (also next to 1)."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.float()
    t = (f * f) * _horner(f, LOG) + e * LN2_LOW
    return (f + t) + e * LN2_HIGH


def exp2_weight(x: Tensor) -> Tensor:
    """floor(2^x * 2^24) for fp32 x <= 0, as int64; 0 below -40 and for -inf."""
    clamped = x.clamp(min=LOWEST)
    whole = clamped.floor()
    scale = ((whole.to(torch.int32) + (127 + WEIGHT_BITS)) << 23).view(torch.float32)
    return (_horner(clamped - whole, EXP2) * scale).floor().to(torch.int64)
