"""Wavelets on the GPU: every level of every transform in one launch.

n levels take blocks of P = 2^n values a channel to blocks of P values: out[m, row] = gain * sum over j and q of
taps[row, j, q] * in[m + j - first, q], m counting blocks and wrapping around the clip. The taps are what the definition
makes of single impulses, so no filter is written here; Haar's are all 1 and -1. A program holds all P rows of its blocks:
what it reads twice, because a filter reaches over its block, it reads from the cache.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase
from kinetok.kernels.wavelet import reference

FRAMES, PACKET, PYRAMID = 0, 1, 2  # how the P values of a block lie in memory


@triton.jit
def _place(row, block, blocks, channels, time_stride, channel_stride, LEVELS: tl.constexpr, LAYOUT: tl.constexpr):
    """Where value ``row`` of ``block`` lies, without its batch and channel."""
    block = block.to(tl.int64)
    if LAYOUT == 0:
        return (block * (1 << LEVELS) + row) * time_stride
    if LAYOUT == 1:
        return block * time_stride + (row * channels).to(tl.int64) * channel_stride
    # A level with w values a block comes after blocks * w others; the lows are value 0.
    width, start = row * 0 + 1, row * 0
    for level in tl.static_range(LEVELS):
        width = tl.where(row >= (1 << level), 1 << level, width)
        start = tl.where(row >= (1 << level), 1 << level, start)
    return (start * blocks + block * width + row - start) * time_stride


@triton.jit
def _source(frame, length, LEVELS: tl.constexpr, REFLECT: tl.constexpr):
    """The frame that stands for ``frame`` where the clip has no such frame; ``reference.extension`` in closed form."""
    if not REFLECT:
        return tl.minimum(frame, length - 1)
    for level in tl.static_range(LEVELS - 1, -1, -1):
        units = (length + (1 << level) - 1) >> level
        mirrored = (tl.maximum(units - 2, 0) << level) + frame % (1 << level)
        frame = tl.where((frame >> level) >= units, mirrored, frame)
    return frame


@triton.jit
def _transform(
    in_ptr,
    out_ptr,
    taps_ptr,
    blocks,
    channels,
    length,
    first,
    tiles,
    in_batch,
    in_time,
    in_channel,
    out_batch,
    out_time,
    out_channel,
    LEVELS: tl.constexpr,
    J: tl.constexpr,
    IN_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    REFLECT: tl.constexpr,
    CHANNELS_FAST: tl.constexpr,
    N: tl.constexpr,
):
    P: tl.constexpr = 1 << LEVELS
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    lane = (tl.program_id(0) % tiles) * N + tl.arange(0, N)
    if CHANNELS_FAST:
        block, channel = lane // channels, lane % channels
    else:
        block, channel = lane % blocks, lane // blocks
    inside = lane < blocks * channels
    base = in_ptr + batch * in_batch + channel.to(tl.int64) * in_channel
    row = tl.arange(0, P)[:, None]
    total = tl.zeros([P, N], taps_ptr.dtype.element_ty)
    for j in range(J):
        source = (block + j - first + blocks * J) % blocks if J > 1 else block
        for q in tl.static_range(P):
            if IN_LAYOUT == 0:
                place = _source(source * P + q, length, LEVELS, REFLECT).to(tl.int64) * in_time
            else:
                place = _place(q + source * 0, source, blocks, channels, in_time, in_channel, LEVELS, IN_LAYOUT)
            value = tl.load(base + place, mask=inside, other=0.0).to(total.dtype)
            total += tl.load(taps_ptr + (row * J + j) * P + q) * value[None, :]
    out = out_ptr + batch * out_batch + channel.to(tl.int64)[None, :] * out_channel
    place = _place(row, block[None, :], blocks, channels, out_time, out_channel, LEVELS, OUT_LAYOUT)
    gain = tl.load(taps_ptr + P * J * P)
    tl.store(out + place, (total * gain).to(out_ptr.dtype.element_ty), mask=inside[None, :])


class Bank(NamedTuple):
    """``taps`` holds [P, J, P] numbers and then the gain; block m reads the blocks from m - ``first`` on."""

    taps: Tensor
    reach: int
    first: int


def _pyramid(levels: int, blocks: int) -> Tensor:
    """Position in time of value ``[block, row]`` of a pyramid, as ``_place`` has it."""
    places = torch.zeros(blocks, 2**levels, dtype=torch.int64)
    for row in range(2**levels):
        start = 1 << (row.bit_length() - 1) if row else 0
        places[:, row] = start * blocks + torch.arange(blocks) * max(start, 1) + row - start
    return places


@lru_cache(maxsize=64)
def _bank(
    wavelet: str, levels: int, tree: str, gain: float, inverse: bool, dtype: torch.dtype, device: torch.device
) -> Bank:
    size, around = 2**levels, len(reference.SCALING[wavelet])  # no filter reaches over more blocks than it has taps
    blocks = 2 * around + 1
    eye = torch.eye(size, dtype=torch.float64)
    impulses = torch.zeros(size, blocks, size, dtype=torch.float64)
    impulses[:, around] = eye
    places = _pyramid(levels, blocks).flatten()
    if inverse:
        coefficients = impulses
        if tree == "pyramid":
            coefficients = torch.zeros(size, blocks * size, dtype=torch.float64)
            coefficients[:, places] = impulses.flatten(1)
            coefficients = coefficients[..., None]
        answer = reference.idwt(coefficients, levels, wavelet, gain, tree, True)
    else:
        answer = reference.dwt(impulses.flatten(1)[..., None], levels, wavelet, "periodic", gain, tree, True)
        answer = answer[:, places] if tree == "pyramid" else answer
    answer = answer.reshape(size, blocks, size)  # [q, block, row]
    used = torch.nonzero(answer.abs().amax((0, 2)) > 1e-15).flatten() - around
    first, last = int(used.max()), int(used.min())
    taps = torch.stack([answer[:, around + first - j].T for j in range(first - last + 1)], dim=1)  # [row, j, q]
    factor = taps.abs().max()
    if not torch.allclose(taps.abs(), factor):
        factor = torch.ones_like(factor)
    numbers = torch.cat(((taps / factor).flatten(), factor[None]))
    return Bank(numbers.to(device, dtype), taps.shape[1], first)


def _lanes(levels: int) -> int:
    return max(32, 2048 >> levels)


def _launch(
    source: Tensor,
    out: Tensor,
    bank: Bank,
    layouts: tuple[int, int],
    levels: int,
    length: int,
    reflect: bool,
    last: bool,
) -> None:
    time, channel = (1, 2) if last else (2, 1)
    frames = source if layouts[0] == FRAMES else out
    channels, lanes = frames.shape[channel], _lanes(levels)
    blocks = (source if layouts[0] != FRAMES else out).numel() // (source.shape[0] * channels * 2**levels)
    tiles = triton.cdiv(blocks * channels, lanes)
    _transform[(source.shape[0] * tiles,)](
        source,
        out,
        bank.taps,
        blocks,
        channels,
        length,
        bank.first,
        tiles,
        *(tensor.stride(axis) for tensor in (source, out) for axis in (0, time, channel)),
        LEVELS=levels,
        J=bank.reach,
        IN_LAYOUT=layouts[0],
        OUT_LAYOUT=layouts[1],
        REFLECT=reflect,
        CHANNELS_FAST=last,
        N=lanes,
        num_warps=4,
    )


def _single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def dwt(x: Tensor, levels: int, wavelet: str, mode: str, gain: float, tree: str, channels_last: bool) -> Tensor:
    time = 1 if channels_last else 2
    size, shape = 2**levels, list(x.shape)
    blocks = triton.cdiv(shape[time], size)
    shape[time] = blocks if tree == "packet" else blocks * size
    shape[3 - time] *= size if tree == "packet" else 1
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.numel():
        bank = _bank(wavelet, levels, tree, gain, False, _single(x.dtype), x.device)
        layouts = (FRAMES, PACKET if tree == "packet" else PYRAMID)
        _launch(x, out, bank, layouts, levels, x.shape[time], mode == "reflect", channels_last)
    return out


def idwt(y: Tensor, levels: int, wavelet: str, gain: float, tree: str, channels_last: bool) -> Tensor:
    time = 1 if channels_last else 2
    shape = list(y.shape)
    if tree == "packet":
        shape[time] *= 2**levels
        shape[3 - time] //= 2**levels
    out = torch.empty(shape, dtype=y.dtype, device=y.device)
    if out.numel():
        bank = _bank(wavelet, levels, tree, gain, True, _single(y.dtype), y.device)
        layouts = (PACKET if tree == "packet" else PYRAMID, FRAMES)
        _launch(y, out, bank, layouts, levels, shape[time], False, channels_last)
    return out


def _case(name: str, wavelet: str, levels: int, *, inverse: bool, last: bool = True, pyramid: bool = False) -> AotCase:
    reach = _bank(
        wavelet, levels, "pyramid" if pyramid else "packet", 1.0, inverse, torch.float32, torch.device("cpu")
    ).reach
    layouts = (FRAMES, PYRAMID if pyramid else PACKET)
    numbers = ("blocks", "channels", "length", "first", "tiles")
    strides = tuple(f"{side}_{axis}" for side in ("in", "out") for axis in ("batch", "time", "channel"))
    return AotCase(
        name=name,
        kernel=_transform,
        signature={p: "*fp32" for p in ("in_ptr", "out_ptr", "taps_ptr")} | {n: "i32" for n in (*numbers, *strides)},
        constexprs={
            "LEVELS": levels,
            "J": reach,
            "IN_LAYOUT": layouts[inverse],
            "OUT_LAYOUT": layouts[not inverse],
            "REFLECT": wavelet == "haar" and not inverse,
            "CHANNELS_FAST": last,
            "N": _lanes(levels),
        },
        aligned=("in_ptr", "out_ptr", "taps_ptr", "channels", "in_batch", "out_batch")
        + (("in_time", "out_time") if last else ()),
    )


AOT = [
    _case(f"{'idwt' if inverse else 'dwt'}_{wavelet}_{levels}", wavelet, levels, inverse=inverse)
    for inverse in (False, True)
    for wavelet, levels in (("haar", 1), ("haar", 2), ("haar", 6), ("db2", 1), ("db4", 3))
] + [
    _case("dwt_haar_2_channels_first", "haar", 2, inverse=False, last=False),
    _case("dwt_db2_3_pyramid", "db2", 3, inverse=False, pyramid=True),
    _case("idwt_db2_3_pyramid", "db2", 3, inverse=True, pyramid=True),
]
