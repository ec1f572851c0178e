"""The product with a packed weight that the layers' products and the head share: on the device, and how it is launched.

The weight is the left operand, so every batch runs the same matrix instructions and sums along K in the same order: tile
after tile, then the parts of a split K in their order. Nothing is added by floating-point atomics.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase
from kinetok.kernels.linear.packing import BATCH, LEAST_BATCH_TILE, ROWS, split_k, tile_columns

QUANTUM = tl.constexpr(2.0**22)


@triton.jit
def _halve(x):
    """Sum neighbours of the last axis: a reduction whose order is written down, not left to the layout."""
    left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return left + right


@triton.jit
def _squares(x):
    """Squares of ``x [B, W]`` in sums of eight neighbours ``[B, W / 8]``, fp32."""
    x = x.to(tl.float32)
    return _halve(_halve(_halve(x * x)))


@triton.jit
def _sum_columns(x):
    """Row sums of ``x [B, 4, 8 or 16]`` as a fixed tree."""
    if x.shape[1] == 16:
        x = _halve(x)
    if x.shape[1] == 8:
        x = _halve(x)
    return tl.reshape(_halve(_halve(x)), (x.shape[0],))


@triton.jit
def _number(words, LANE: tl.constexpr, dtype: tl.constexpr, KIND: tl.constexpr):
    """One lane of the words in ``dtype``, without their scale: exact, from 2.5 instructions. int8 and int4 as 2^-22 of it.

    Bits of a word in a float's low places are that whole number times 2^-149, which one multiply-add brings to 2^-22 and
    centres, wherever the lane lies. Lanes beyond bit 23 are shifted down first.
    """
    if KIND == "int8" or KIND == "int4":
        SIZE: tl.constexpr = 8 if KIND == "int8" else 4
        AT: tl.constexpr = LANE * SIZE % 24
        bits = (words if LANE * SIZE < 24 else words >> 24) & ((1 << SIZE) - 1 << AT)
        unit = tl.full(words.shape, 2.0 ** (127 - AT), tl.float32)
        zero = tl.full(words.shape, -(2.0 ** (SIZE - 23)), tl.float32)
        return tl.fma(bits.to(tl.float32, bitcast=True), unit, zero).to(dtype)
    elif KIND == "fp8":  # by hand, as Ampere lacks the conversion: its bits in a float's places are 2^-120 of it
        sign = (words << (24 - 8 * LANE)) & -2147483648
        rest = (words << (20 - 8 * LANE) if LANE < 3 else words >> 4) & 0x07F00000
        return ((sign | rest).to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)
    else:
        return words


@triton.jit
def product(
    x_ptr,
    data_ptr,
    scale_ptr,
    partial_ptr,
    counter_ptr,
    batch,
    x_stride,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BATCH_TILE: tl.constexpr,
    NORMALISE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Unscaled sums ``[64, BATCH_TILE]`` of a row tile, sums of squares ``[BATCH_TILE]`` of x, and whether they are whole.

    Grid (batch tiles, SPLIT, row tiles). With a split K only the program that comes last has whole sums.
    """
    ROWS: tl.constexpr = 64
    TILES: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    SHARE: tl.constexpr = (TILES + SPLIT - 1) // SPLIT
    LANES: tl.constexpr = 8 if KIND == "int4" else 4 if KIND == "int8" or KIND == "fp8" else 1
    STORED: tl.constexpr = WIDTH // LANES
    part, tile = tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row, at = tl.arange(0, ROWS), tl.arange(0, STORED)
    b = tl.program_id(0) * BATCH_TILE + tl.arange(0, BATCH_TILE)
    data = data_ptr + tile.to(tl.int64) * (TILES * ROWS * STORED) + (row[:, None] * STORED + at[None, :])
    x_row = x_ptr + b[:, None].to(tl.int64) * x_stride
    total = tl.zeros([ROWS, BATCH_TILE], tl.float32)
    squares = tl.zeros([BATCH_TILE, STORED // 8], tl.float32)
    for step in tl.range(part * SHARE, tl.minimum(part * SHARE + SHARE, TILES), num_stages=STAGES):
        words = tl.load(data + step * (ROWS * STORED), eviction_policy="evict_first")
        sums = total
        for lane in tl.static_range(LANES):
            k = step * WIDTH + lane * STORED + at
            x = tl.load(x_row + k[None, :], mask=(b[:, None] < batch) & (k[None, :] < COLUMNS), other=0.0)
            if NORMALISE:
                squares += _squares(x)
            number = _number(words, lane, dtype, KIND)
            if GROUP and lane * STORED % (GROUP or 1) == 0:
                sums = tl.dot(number, tl.trans(x), input_precision="ieee")
            else:
                sums = tl.dot(number, tl.trans(x), sums, input_precision="ieee")
            if (lane + 1) * STORED % (GROUP or 1 << 30) == 0:
                group = (tile * TILES + step) * (WIDTH // GROUP) + lane * STORED // GROUP
                scale = tl.load(scale_ptr + group * ROWS + row).to(tl.float32) * QUANTUM
                total = tl.fma(sums, tl.broadcast_to(scale[:, None], sums.shape), total)
        if not GROUP:
            total = sums
    square = _sum_columns(squares)
    whole = True
    if SPLIT > 1:
        place = tile * tl.num_programs(0) + tl.program_id(0)
        SIZE: tl.constexpr = (ROWS + 1) * BATCH_TILE
        column = tl.arange(0, BATCH_TILE)
        here = partial_ptr + place.to(tl.int64) * (SPLIT * SIZE)
        entry = row[:, None] * BATCH_TILE + column[None, :]
        tl.store(here + part * SIZE + entry, total)
        tl.store(here + part * SIZE + ROWS * BATCH_TILE + column, square)
        tl.debug_barrier()  # all of the program's stores come before its thread 0 counts it
        whole = tl.atomic_add(counter_ptr + place, 1, sem="acq_rel") == SPLIT - 1
        if whole:
            total = tl.zeros([ROWS, BATCH_TILE], tl.float32)
            square = tl.zeros([BATCH_TILE], tl.float32)
            for other in range(SPLIT):
                total += tl.load(here + other * SIZE + entry, cache_modifier=".cg")
                square += tl.load(here + other * SIZE + ROWS * BATCH_TILE + column, cache_modifier=".cg")
            tl.store(counter_ptr + place, 0)
    return total, square, whole


@triton.jit
def scaled(
    total,
    square,
    scale_ptr,
    eps,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """The whole sums of ``product`` times the rows' scales and the factors of RMSNorm."""
    if (KIND == "int8" or KIND == "fp8") and not GROUP:
        scale = tl.load(scale_ptr + tl.program_id(2) * 64 + tl.arange(0, 64))
        total *= (scale * QUANTUM if KIND == "int8" else scale)[:, None]
    if NORMALISE:
        total *= tl.rsqrt(square / COLUMNS + eps)[None, :]
    return total


def batch_tile(batch: int, group: int) -> int:
    """Rows of x in one program: 16, 32 or 64. Fewer than 16 would take other matrix instructions.

    Not 64 where groups have scales: the sums of a group and the whole sums together would spill.
    """
    return min(max(triton.next_power_of_2(batch), 16), LEAST_BATCH_TILE if group else 64)


def stages(tile: int) -> int:
    """Tiles in flight: what fits in 99 KB of shared memory with a 16-bit weight."""
    return 3 if tile == 64 else 4


def warps(tile: int) -> int:
    """Eight share the 64 x 64 sums: four would spill on sm_120, whatever the bound on their registers."""
    return 8 if tile == 64 else 4


def options(tile: int, group: int) -> dict[str, Any]:
    """Compile options: what becomes one multiply-add is said by tl.fma, else it could depend on the size of the batch.

    Without a bound on registers the assembler for Blackwell aims at 80 and spills. The bounds leave room for four programs
    of 16 or 32 rows on a multiprocessor and two of 64; with groups, whose sums are added to the whole ones, three and two.
    """
    registers = {16: 168, 32: 255}[tile] if group else 128
    return {"maxnreg": registers, "enable_fp_fusion": False}


def adjacent(rows: Tensor) -> Tensor:
    """``rows [B, K]`` with adjacent numbers."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def workspace(x: Tensor, split: int, row_tiles: int, tile: int) -> Tensor:
    """Partial sums of a split K; no memory where there is none."""
    batch_tiles = triton.cdiv(min(len(x), BATCH), tile)
    size = row_tiles * batch_tiles * split * (ROWS + 1) * tile if split > 1 else 0
    return torch.empty(size, device=x.device, dtype=torch.float32)


def launches(
    x: Tensor, data: Tensor, scale: Tensor | None, counters: Tensor, kind: str, group: int, rows: int, eps: float | None
) -> Iterator[tuple[slice, tuple[int, int, int], dict[str, Any]]]:
    """For each launch: its rows of x (at most BATCH), the grid, and what a kernel around ``product`` takes by name."""
    x = adjacent(x)
    split, tile = split_k(rows, x.shape[1], kind), batch_tile(len(x), group)
    partial = workspace(x, split, len(data), tile)
    for first in range(0, len(x), BATCH):
        some = x[first : first + BATCH]
        yield (
            slice(first, first + BATCH),
            (triton.cdiv(len(some), tile), split, len(data)),
            {
                "x_ptr": some,
                "data_ptr": data,
                "scale_ptr": data if scale is None else scale,
                "partial_ptr": partial,
                "counter_ptr": counters,
                "batch": len(some),
                "x_stride": x.stride(0),
                "eps": 0.0 if eps is None else eps,
                **sizes(rows, x.shape[1], kind, group, tile, eps is not None),
                "num_warps": warps(tile),
                **options(tile, group),
            },
        )


def sizes(rows: int, columns: int, kind: str, group: int, tile: int, normalise: bool) -> dict[str, Any]:
    """The constants of ``product``."""
    return {
        "COLUMNS": columns,
        "KIND": kind,
        "GROUP": group,
        "WIDTH": tile_columns(kind),
        "SPLIT": split_k(rows, columns, kind),
        "BATCH_TILE": tile,
        "NORMALISE": normalise,
        "STAGES": stages(tile),
    }


WEIGHT_TYPE = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "int8": "*i32", "int4": "*i32", "fp8": "*i32"}


def case(
    name: str,
    kernel: Any,
    constexprs: Mapping[str, Any],
    pointers: Mapping[str, str],
    scalars: Mapping[str, str],
    aligned: tuple[str, ...] = (),
) -> AotCase:
    """``kernel`` around ``product`` with the constants ``sizes`` and its own, its own pointers and numbers by type."""
    kind = constexprs["KIND"]
    shared = {
        "x_ptr": WEIGHT_TYPE[kind if kind in ("fp32", "fp16") else "bf16"],
        "data_ptr": WEIGHT_TYPE[kind],
        "scale_ptr": "*bf16" if constexprs["GROUP"] else "*fp32",
        "partial_ptr": "*fp32",
        "counter_ptr": "*i32",
        **pointers,
    }
    return AotCase(
        name=name,
        kernel=kernel,
        signature={**shared, "batch": "i32", "x_stride": "i32", "eps": "fp32", **scalars},
        constexprs=constexprs,
        aligned=(*shared, "x_stride", *aligned),
        num_warps=warps(constexprs["BATCH_TILE"]),
        options=options(constexprs["BATCH_TILE"], constexprs["GROUP"]),
        is_matmul=kind != "fp32",
        warpgroup=kind != "fp32",
    )
