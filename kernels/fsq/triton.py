"""Finite scalar quantisation on the GPU: one pass over the widest tensor, fp32 inside, no table.

A level set is compiled in: the constants of level j are numbers in the machine code. Nothing of a row depends on the
others, so its bits do not depend on the batch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from kinetok.kernels.aot import AotCase
from kinetok.kernels.fsq.reference import level_constants


@triton.jit
def _level(d, values: tl.constexpr, count: tl.constexpr):
    """values[d], and 0 beyond the last."""
    chosen = tl.full(d.shape, 0.0, tl.float32)
    for j in tl.static_range(count):
        chosen = tl.where(d == j, values[j], chosen)
    return chosen


@triton.jit
def _round(x):
    """Half to even: adding 1.5 * 2^23 leaves no bits for the fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _rounded(z, d, levels: tl.constexpr, half: tl.constexpr, offset: tl.constexpr, shift: tl.constexpr):
    """round(tanh(z + shift) * half - offset) of ``z [rows, ND]``, one level a column."""
    n: tl.constexpr = len(levels)
    z += _level(d, shift, n)
    e = tl.exp2(-2.8853900817779268 * tl.abs(z))
    tanh = (1.0 - e) / (1.0 + e)
    return _round(tl.where(z < 0, -tanh, tanh) * _level(d, half, n) - _level(d, offset, n))


@triton.jit
def _index(rounded, d, width: tl.constexpr, basis: tl.constexpr):
    """Rounded ``[rows, ND]`` to int32 indices ``[rows]``."""
    n: tl.constexpr = len(width)
    digits = rounded + _level(d, width, n)
    return tl.sum(digits.to(tl.int32) * _level(d, basis, n).to(tl.int32), 1)


@triton.jit
def digit(indices, basis: tl.constexpr, level: tl.constexpr, width: tl.constexpr):
    """The code of one level, (digit - floor(l/2)) / floor(l/2), rounded as the definition rounds it."""
    centred = (indices // basis) % level - width
    return tl.div_rn(centred.to(tl.float32), tl.full(centred.shape, width, tl.float32))


@triton.jit
def _encode(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    C: tl.constexpr,
    levels: tl.constexpr,
    half: tl.constexpr,
    offset: tl.constexpr,
    shift: tl.constexpr,
    width: tl.constexpr,
    basis: tl.constexpr,
    PROJECT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    ND: tl.constexpr,
):
    n: tl.constexpr = len(levels)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, ND)[None, :]
    inside = row < rows
    base = x_ptr + row.to(tl.int64)[:, None] * C
    if PROJECT:
        z = tl.zeros([BN, ND], tl.float32) + tl.load(bias_ptr + d, mask=d < n, other=0.0).to(tl.float32)
        for start in tl.static_range(0, C, BC):
            c = start + tl.arange(0, BC)
            x = tl.load(base + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
            for j in tl.static_range(n):
                weight = tl.load(weight_ptr + j * C + c, mask=c < C, other=0.0).to(tl.float32)
                z += tl.where(d == j, tl.sum(x * weight[None, :], 1)[:, None], 0.0)
    else:
        z = tl.load(base + d, mask=inside[:, None] & (d < n), other=0.0).to(tl.float32)
    rounded = _rounded(z, d, levels, half, offset, shift)
    tl.store(out_ptr + row, _index(rounded, d, width, basis), mask=inside)


@triton.jit
def _decode(
    indices_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    C: tl.constexpr,
    levels: tl.constexpr,
    width: tl.constexpr,
    basis: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    n: tl.constexpr = len(levels)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = row < rows
    indices = tl.load(indices_ptr + row, mask=inside, other=0).to(tl.int32)
    base = out_ptr + row.to(tl.int64)[:, None] * C
    for start in tl.static_range(0, C, BC):
        c = start + tl.arange(0, BC)
        total = tl.zeros([BN, BC], tl.float32)
        total += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(n):
            weight = tl.load(weight_ptr + c * n + j, mask=c < C, other=0.0).to(tl.float32)
            total += digit(indices, basis[j], levels[j], width[j])[:, None] * weight[None, :]
        tl.store(base + c[None, :], total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def _quantize(
    z_ptr,
    codes_ptr,
    out_ptr,
    rows,
    levels: tl.constexpr,
    half: tl.constexpr,
    offset: tl.constexpr,
    shift: tl.constexpr,
    width: tl.constexpr,
    basis: tl.constexpr,
    BN: tl.constexpr,
    ND: tl.constexpr,
):
    n: tl.constexpr = len(levels)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, ND)[None, :]
    place = row.to(tl.int64)[:, None] * n + d
    mask = (row < rows)[:, None] & (d < n)
    rounded = _rounded(tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32), d, levels, half, offset, shift)
    per = tl.maximum(_level(d, width, n), 1.0) + tl.zeros([BN, ND], tl.float32)
    tl.store(codes_ptr + place, tl.div_rn(rounded, per), mask=mask)
    tl.store(out_ptr + row, _index(rounded, d, width, basis), mask=row < rows)


@triton.jit
def _quantize_backward(
    grad_ptr,
    z_ptr,
    out_ptr,
    rows,
    scale: tl.constexpr,
    shift: tl.constexpr,
    BN: tl.constexpr,
    ND: tl.constexpr,
):
    n: tl.constexpr = len(scale)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, ND)[None, :]
    place = row.to(tl.int64)[:, None] * n + d
    mask = (row < rows)[:, None] & (d < n)
    z = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32) + _level(d, shift, n)
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    e = tl.exp2(-2.8853900817779268 * tl.abs(z))
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2, without its cancellation
    tl.store(out_ptr + place, (grad * slope * _level(d, scale, n)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize(
    indices_ptr,
    codes_ptr,
    rows,
    levels: tl.constexpr,
    width: tl.constexpr,
    basis: tl.constexpr,
    BN: tl.constexpr,
    ND: tl.constexpr,
):
    n: tl.constexpr = len(levels)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, ND)[None, :]
    indices = tl.load(indices_ptr + row, mask=row < rows, other=0).to(tl.int32)
    codes = tl.zeros([BN, ND], tl.float32)
    for j in tl.static_range(n):
        codes = tl.where(d == j, digit(indices, basis[j], levels[j], width[j])[:, None], codes)
    tl.store(codes_ptr + row.to(tl.int64)[:, None] * n + d, codes, mask=(row < rows)[:, None] & (d < n))


FLAT = {"BN": 256}
"""Rows of a program where a row is one number a level."""
WARPS = 8
"""Of the two kernels with a projection: with 4, a row of 512 numbers spills on sm_120."""


def _constants(levels: tuple[int, ...], *names: str) -> dict[str, tuple[float, ...]]:
    half, offset, shift, width, basis = level_constants(levels)
    known: dict[str, Sequence[float]] = {"half": half, "offset": offset, "shift": shift, "width": width, "basis": basis}
    return {name: tuple(known[name]) for name in names}


def _encode_meta(channels: int, levels: tuple[int, ...], project: bool) -> dict[str, object]:
    blocks = {"BN": 16, "BC": min(512, next_power_of_2(channels))} if project else {**FLAT, "BC": 1}
    shared = {"C": channels, "levels": levels, "PROJECT": project, "ND": next_power_of_2(len(levels))}
    return {**shared, **_constants(levels, "half", "offset", "shift", "width", "basis"), **blocks}


def _decode_meta(channels: int, levels: tuple[int, ...]) -> dict[str, object]:
    blocks = {"BN": 16, "BC": min(256, next_power_of_2(channels))}
    return {"C": channels, "levels": levels, **_constants(levels, "width", "basis"), **blocks}


def _scale(levels: tuple[int, ...]) -> tuple[float, ...]:
    half, _, _, width, _ = level_constants(levels)
    return tuple(h / w for h, w in zip(half, width, strict=True))


def fsq_encode(x: Tensor, weight: Tensor | None, bias: Tensor | None, levels: list[int]) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape[:-1], dtype=torch.int32, device=x.device)
    if not out.numel():
        return out
    meta = _encode_meta(x.shape[-1], tuple(levels), weight is not None)
    parameters = (x, x) if weight is None or bias is None else (weight.contiguous(), bias)
    _encode[(triton.cdiv(out.numel(), meta["BN"]),)](x, *parameters, out, out.numel(), **meta, num_warps=WARPS)
    return out


def fsq_decode(indices: Tensor, weight: Tensor, bias: Tensor, levels: list[int]) -> Tensor:
    indices = indices.contiguous()
    out = torch.empty(*indices.shape, weight.shape[0], dtype=weight.dtype, device=weight.device)
    if out.numel():
        meta, rows = _decode_meta(weight.shape[0], tuple(levels)), indices.numel()
        _decode[(triton.cdiv(rows, meta["BN"]),)](
            indices, weight.contiguous(), bias, out, rows, **meta, num_warps=WARPS
        )
    return out


def fsq_quantize(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    z, key = z.contiguous(), tuple(levels)
    codes = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    out = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    if out.numel():
        constants = _constants(key, "half", "offset", "shift", "width", "basis")
        grid = (triton.cdiv(out.numel(), FLAT["BN"]),)
        _quantize[grid](z, codes, out, out.numel(), levels=key, **constants, **FLAT, ND=next_power_of_2(len(key)))
    return codes, out


def fsq_quantize_backward(grad: Tensor, z: Tensor, levels: list[int]) -> Tensor:
    grad, z, key = grad.contiguous(), z.contiguous(), tuple(levels)
    out = torch.empty_like(z)
    if out.numel():
        rows, constants = z.numel() // len(key), {"scale": _scale(key), **_constants(key, "shift")}
        grid = (triton.cdiv(rows, FLAT["BN"]),)
        _quantize_backward[grid](grad, z, out, rows, **constants, **FLAT, ND=next_power_of_2(len(key)))
    return out


def fsq_dequantize(indices: Tensor, levels: list[int]) -> Tensor:
    indices, key = indices.contiguous(), tuple(levels)
    codes = torch.empty(*indices.shape, len(key), dtype=torch.float32, device=indices.device)
    if codes.numel():
        rows, constants = indices.numel(), _constants(key, "width", "basis")
        grid = (triton.cdiv(rows, FLAT["BN"]),)
        _dequantize[grid](indices, codes, rows, levels=key, **constants, **FLAT, ND=next_power_of_2(len(key)))
    return codes


def _cases() -> list[AotCase]:
    released, default = (8, 8, 8, 5, 5, 5), (8, 5, 5, 5)
    cases = []
    for name, channels, levels in (("released", 512, released), ("default", 256, default)):
        projected = {"weight_ptr": "*fp32", "bias_ptr": "*fp32", "rows": "i32"}
        cases += [
            AotCase(
                name=f"fsq_encode_{name}",
                kernel=_encode,
                signature={"x_ptr": "*fp32", "out_ptr": "*i32", **projected},
                constexprs=_encode_meta(channels, levels, True),
                aligned=("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"),
                num_warps=WARPS,
            ),
            AotCase(
                name=f"fsq_decode_{name}",
                kernel=_decode,
                signature={"indices_ptr": "*i32", "out_ptr": "*fp32", **projected},
                constexprs=_decode_meta(channels, levels),
                aligned=("indices_ptr", "weight_ptr", "bias_ptr", "out_ptr"),
                num_warps=WARPS,
            ),
        ]
    flat = {"rows": "i32", "codes_ptr": "*fp32"}
    named = ("half", "offset", "shift", "width", "basis")
    blocks = {**FLAT, "ND": next_power_of_2(len(released))}
    return [
        *cases,
        AotCase(
            name="fsq_quantize",
            kernel=_quantize,
            signature={"z_ptr": "*fp32", "out_ptr": "*i32", **flat},
            constexprs={"levels": released, **_constants(released, *named), **blocks},
            aligned=("z_ptr", "codes_ptr", "out_ptr"),
        ),
        AotCase(
            name="fsq_quantize_backward",
            kernel=_quantize_backward,
            signature={"grad_ptr": "*fp32", "z_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32"},
            constexprs={"scale": _scale(released), **_constants(released, "shift"), **blocks},
            aligned=("grad_ptr", "z_ptr", "out_ptr"),
        ),
        AotCase(
            name="fsq_dequantize",
            kernel=_dequantize,
            signature={"indices_ptr": "*i32", **flat},
            constexprs={"levels": released, **_constants(released, "width", "basis"), **blocks},
            aligned=("indices_ptr", "codes_ptr"),
        ),
    ]


AOT = _cases()
