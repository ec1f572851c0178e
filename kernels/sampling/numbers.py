"""The arithmetic of docs/numerics.md in Triton: fp32 operations rounded one by one."""

import triton
import triton.language as tl

from kinetok.kernels.sampling import arithmetic

LOG = tl.constexpr(arithmetic.LOG)
LN2_HIGH, LN2_LOW = tl.constexpr(arithmetic.LN2_HIGH), tl.constexpr(arithmetic.LN2_LOW)
SQRT_HALF_BITS = tl.constexpr(arithmetic.SQRT_HALF_BITS)
EXP2 = tl.constexpr(arithmetic.EXP2)
LOWEST = tl.constexpr(arithmetic.LOWEST)
SCALE_BIAS = tl.constexpr(127 + arithmetic.WEIGHT_BITS)
EXACT = {"enable_fp_fusion": False}


@triton.jit
def log_fp32(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    r = tl.full(x.shape, LOG[8], tl.float32)
    for i in tl.static_range(8):
        r = r * f + LOG[7 - i]
    e = exponent.to(tl.float32)
    t = (f * f) * r + e * LN2_LOW
    return (f + t) + e * LN2_HIGH


@triton.jit
def exp2_weight(x):
    x = tl.maximum(x, LOWEST)
    whole = tl.floor(x)
    f = x - whole
    r = tl.full(x.shape, EXP2[6], tl.float32)
    for i in tl.static_range(6):
        r = r * f + EXP2[5 - i]
    power = ((whole.to(tl.int32) + SCALE_BIAS) << 23).to(tl.float32, bitcast=True)
    return tl.floor(r * power).to(tl.int32)


@triton.jit
def gumbel(first, seed, position, request, COUNT: tl.constexpr):
    """Noise of the tokens first to first + COUNT - 1; first and COUNT are multiples of 4."""
    block = ((first // 4) + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = tl.zeros([COUNT // 4], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + position.to(tl.uint32), zero + request.to(tl.uint32), block, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COUNT,))
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -log_fp32(-log_fp32(uniform))
