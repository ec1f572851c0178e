"""The decoder's ends on the GPU. A program's tile has one size whatever the batch: a row's bits do not depend on it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase
from kinetok.kernels.fsq.reference import level_constants
from kinetok.kernels.fsq.triton import digit

ROWS = {"_fsq_conv": 32, "_conv_idwt": 64}
"""Time steps of a program; 64 rows are what wgmma takes."""
COLUMNS, INNER = 64, 32
WARPS = {"_fsq_conv": 8, "_conv_idwt": 4}


@triton.jit
def _fsq_conv(
    indices_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    rows,
    length,
    times,
    left,
    batch_stride,
    time_stride,
    C: tl.constexpr,
    levels: tl.constexpr,
    width: tl.constexpr,
    basis: tl.constexpr,
    TAPS: tl.constexpr,
    DILATION: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Row (clip, t) of ``[rows, C]``; a folded tap costs n + 1 products where the layers themselves take as many as inputs."""
    n: tl.constexpr = len(levels)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    clip, t = row // times, row % times
    inside = row < rows
    total = tl.zeros([BN, BC], tl.float32)
    total += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for tap in tl.range(TAPS, num_stages=1):  # unrolled, it spills
        source = t + tap * DILATION - left
        real = inside & (source >= 0) & (source < length)
        place = clip.to(tl.int64) * batch_stride + source.to(tl.int64) * time_stride
        indices = tl.load(indices_ptr + place, mask=real, other=0).to(tl.int32)
        for j in tl.static_range(n + 1):
            weight = tl.load(table_ptr + (tap * (n + 1) + j) * C + c, mask=c < C, other=0.0).to(tl.float32)
            if j < n:
                code = tl.where(real, digit(indices, basis[j], levels[j], width[j]), 0.0)
            else:
                code = tl.where(real, 1.0, 0.0)
            total += code[:, None] * weight[None, :]
    total = tl.where(total < 0, 0.0, total)  # keeps NaN
    place = out_ptr + row.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def _conv_idwt(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    rows,
    length,
    times,
    left,
    batch_stride,
    time_stride,
    C: tl.constexpr,
    INPUTS: tl.constexpr,
    TAPS: tl.constexpr,
    DILATION: tl.constexpr,
    LEVELS: tl.constexpr,
    GAIN: tl.constexpr,
    AFFINE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """All P = 2^LEVELS frames of BM patches, BN / P of their C numbers each: the butterflies need no other program."""
    BC: tl.constexpr = BN >> LEVELS
    PARTS: tl.constexpr = (INPUTS + BK - 1) // BK
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    c = tl.program_id(1) * BC + n % BC
    known = c < C
    output = n // BC * C + c
    clip, t = row // times, row % times
    base = x_ptr + clip.to(tl.int64) * batch_stride
    total = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(TAPS * PARTS):
        tap, i = step // PARTS, step % PARTS * BK + tl.arange(0, BK)
        source = t + tap * DILATION - left
        real = (row < rows) & (source >= 0) & (source < length)
        at = base + source.to(tl.int64) * time_stride
        x = tl.load(at[:, None] + i[None, :], mask=real[:, None] & (i < INPUTS)[None, :], other=0.0).to(tl.float32)
        x = tl.where(x < 0, 0.0, x).to(dtype)
        place = (output[None, :] * TAPS + tap) * INPUTS + i[:, None]
        weight = tl.load(weight_ptr + place, mask=known[None, :] & (i < INPUTS)[:, None], other=0.0)
        total = tl.dot(x, weight, total, input_precision="tf32x3")
    total += tl.load(bias_ptr + output, mask=known, other=0.0).to(tl.float32)[None, :]
    for _ in tl.static_range(LEVELS):
        # The first half of the columns are lows. Their sums and differences move to the end: one more bit of the frame.
        low, high = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
        total = tl.reshape(tl.join(low + high, low - high), (BM, BN))
    if LEVELS:
        total = tl.permute(tl.reshape(total * GAIN, (BM, BC, BN // BC)), (0, 2, 1))
        total = tl.reshape(total, (BM, BN))
    if AFFINE:
        scale = tl.load(scale_ptr + c, mask=known, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + c, mask=known, other=0.0).to(tl.float32)
        total = total * scale[None, :] + shift[None, :]
    frame = (row.to(tl.int64) << LEVELS)[:, None] + (n // BC)[None, :]
    tl.store(out_ptr + frame * C + c[None, :], total.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & known)


def _fsq_meta(channels: int, levels: tuple[int, ...], taps: int, dilation: int) -> dict[str, object]:
    _, _, _, width, basis = level_constants(levels)
    constants = {"levels": levels, "width": tuple(width), "basis": tuple(basis), "TAPS": taps, "DILATION": dilation}
    return {"C": channels, **constants, "BN": ROWS["_fsq_conv"], "BC": min(128, triton.next_power_of_2(channels))}


def _conv_meta(width: int, inputs: int, taps: int, dilation: int, levels: int, affine: bool) -> dict[str, object]:
    shape = {
        "C": width,
        "INPUTS": inputs,
        "TAPS": taps,
        "DILATION": dilation,
        "LEVELS": levels,
        "GAIN": 2 ** (levels / 2),
    }
    return {**shape, "AFFINE": affine, "BM": ROWS["_conv_idwt"], "BN": COLUMNS, "BK": INNER}


def fsq_conv(
    indices: Tensor, table: Tensor, bias: Tensor, levels: list[int], padding: list[int], dilation: int
) -> Tensor:
    batch, length = indices.shape
    taps, _, channels = table.shape
    times = length + sum(padding) - (taps - 1) * dilation
    out = torch.empty(batch, times, channels, dtype=table.dtype, device=table.device)
    if out.numel():
        meta, rows = _fsq_meta(channels, tuple(levels), taps, dilation), batch * times
        _fsq_conv[(triton.cdiv(rows, meta["BN"]), triton.cdiv(channels, meta["BC"]))](
            indices,
            table.contiguous(),
            bias.contiguous(),
            out,
            rows,
            length,
            times,
            padding[0],
            *indices.stride(),
            **meta,
            num_warps=WARPS["_fsq_conv"],
        )
    return out


def conv_idwt(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    levels: int,
    padding: list[int],
    dilation: int,
) -> Tensor:
    batch, length, inputs = x.shape
    outputs, taps, _ = weight.shape
    times, width = length + sum(padding) - (taps - 1) * dilation, outputs >> levels
    out = torch.empty(batch, times << levels, width, dtype=x.dtype, device=x.device)
    if out.numel():
        x = x if x.stride(2) == 1 else x.contiguous()
        meta, rows = _conv_meta(width, inputs, taps, dilation, levels, scale is not None), batch * times
        _conv_idwt[(triton.cdiv(rows, meta["BM"]), triton.cdiv(width, COLUMNS >> levels))](
            x,
            weight.contiguous(),
            bias.contiguous(),
            bias if scale is None else scale.contiguous(),
            bias if shift is None else shift.contiguous(),
            out,
            rows,
            length,
            times,
            padding[0],
            x.stride(0),
            x.stride(1),
            **meta,
            num_warps=WARPS["_conv_idwt"],
        )
    return out


def _cases() -> list[AotCase]:
    numbers = dict.fromkeys(("rows", "length", "times", "left", "batch_stride", "time_stride"), "i32")
    cases = []
    for name, channels, levels in (("released", 512, (8, 8, 8, 5, 5, 5)), ("default", 256, (7, 5, 5, 5, 5))):
        pointers = dict.fromkeys(("table_ptr", "bias_ptr", "out_ptr"), "*fp32")
        cases.append(
            AotCase(
                name=f"fsq_conv_{name}",
                kernel=_fsq_conv,
                signature={"indices_ptr": "*i64", **pointers, **numbers},
                constexprs=_fsq_meta(channels, levels, 3, 1),
                aligned=("indices_ptr", *pointers),
                num_warps=WARPS["_fsq_conv"],
            )
        )
    for name, inputs, wavelet in (("released", 512, 0), ("default", 256, 0), ("haar_2", 512, 1), ("haar_4", 512, 2)):
        pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr", "out_ptr"), "*fp32")
        cases.append(
            AotCase(
                name=f"conv_idwt_{name}",
                kernel=_conv_idwt,
                signature={**pointers, **numbers},
                constexprs=_conv_meta(272, inputs, 3, 1, wavelet, True),
                aligned=(*pointers, "batch_stride", "time_stride"),
                num_warps=WARPS["_conv_idwt"],
                is_matmul=True,
                warpgroup=True,
            )
        )
    return cases


AOT = _cases()
