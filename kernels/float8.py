"""float8 e4m3 (finite, bias 7) in Triton by whole-number arithmetic, because sm_80 has no conversion of its own.

Tensors go to a kernel as ``view(torch.uint8)``. Equal to torch's conversion, bit for bit, save that a stored NaN is read
as 480.
"""

import triton
import triton.language as tl
from torch import Tensor

LARGEST: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def float8_to_float32(codes):
    """Values of uint8 ``codes``: as a float16 with the same bits the exponent's bias is 15, so 2^8 is missing."""
    wide = codes.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def float32_to_float8(x):
    """uint8 codes nearest to ``x``, ties to even; beyond +-448 the code of +-448."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), LARGEST)
    # Adding 2^14 leaves steps of 2^-9, those of the codes below 2^-6, and lets the hardware round.
    small = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    coarse = size.to(tl.uint32, bitcast=True)
    large = ((coarse + 0x7FFFF + ((coarse >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    code = tl.where(size < 0.015625, small, large)
    code = tl.where(x == x, code, 0x7F)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


def rows_adjacent(kv_scale: Tensor) -> Tensor:
    """``kv_scale [2, B, H]`` with the scales of keys, and those of values, side by side; a copy only where they are not."""
    return kv_scale if kv_scale.stride()[1:] == (kv_scale.shape[2], 1) else kv_scale.contiguous()
