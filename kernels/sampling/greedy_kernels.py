"""The arg-max of the head: the maximum of each tile where its product is formed, then that of all tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase
from kinetok.kernels.linear.packing import ROWS
from kinetok.kernels.linear.product import case, launches, product, scaled, sizes
from kinetok.kernels.sampling.advance import LAST_ID, RUNNING_, STATE_TYPES, advance


@triton.jit
def head_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    position_ptr,
    least_ptr,
    value_ptr,
    id_ptr,
    partial_ptr,
    counter_ptr,
    batch,
    x_stride,
    eps,
    end_id,
    pad_id,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BATCH_TILE: tl.constexpr,
    NORMALISE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The largest logit of each row tile of the head and its lowest id, ``[B, row tiles]``; NaN where there is one."""
    total, square, whole = product(
        x_ptr,
        data_ptr,
        scale_ptr,
        partial_ptr,
        counter_ptr,
        batch,
        x_stride,
        COLUMNS,
        KIND,
        GROUP,
        WIDTH,
        SPLIT,
        BATCH_TILE,
        NORMALISE,
        STAGES,
    )
    if whole:
        y = scaled(total, square, scale_ptr, eps, COLUMNS, KIND, GROUP, NORMALISE)
        n = tl.program_id(2) * 64 + tl.arange(0, 64)
        b = tl.program_id(0) * BATCH_TILE + tl.arange(0, BATCH_TILE)
        inside = b < batch
        early = tl.load(position_ptr + b, mask=inside, other=0) < tl.load(least_ptr + b, mask=inside, other=0)
        banned = ((n == end_id)[:, None] & early[None, :]) | ((n == pad_id) | (n >= OUTPUTS))[:, None]
        y = tl.where(banned, float("-inf"), y)
        odd = tl.max((y != y).to(tl.int32), 0) > 0
        value = tl.max(y, 0)
        lowest = tl.min(tl.where(y == value[None, :], n[:, None], LAST_ID), 0)
        at = b * tl.num_programs(2) + tl.program_id(2)
        tl.store(value_ptr + at, tl.where(odd, float("nan"), value), mask=inside)
        tl.store(id_ptr + at, lowest, mask=inside)


@triton.jit
def pick_kernel(
    value_ptr,
    id_ptr,
    position_ptr,
    remaining_ptr,
    status_ptr,
    token_ptr,
    end_id,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(status_ptr + row) != RUNNING_:
        tl.store(token_ptr + row, end_id.to(tl.int64))
    else:
        at = tl.arange(0, BLOCK)
        value = tl.load(value_ptr + row * TILES + at, mask=at < TILES, other=float("-inf"))
        ids = tl.load(id_ptr + row * TILES + at, mask=at < TILES, other=LAST_ID)
        best = tl.max(value, 0)
        good = (tl.max((value != value).to(tl.int32), 0) == 0) & (tl.abs(best) < float("inf"))
        token = tl.min(tl.where(value == best, ids, LAST_ID), 0)
        advance(row, token, good, token_ptr, position_ptr, remaining_ptr, status_ptr, end_id)


def greedy_step(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    counters: Tensor,
    kind: str,
    group: int,
    rows: int,
    eps: float | None,
    position: Tensor,
    least: Tensor,
    remaining: Tensor,
    status: Tensor,
    end_id: int,
    pad_id: int,
) -> Tensor:
    token = torch.empty_like(position)
    value = torch.empty((len(x), len(data)), device=x.device, dtype=torch.float32)
    ids = torch.empty_like(value, dtype=torch.int32)
    for some, grid, shared in launches(x, data, scale, counters, kind, group, rows, eps):
        head_kernel[grid](
            position_ptr=position[some],
            least_ptr=least[some],
            value_ptr=value[some],
            id_ptr=ids[some],
            end_id=end_id,
            pad_id=pad_id,
            OUTPUTS=rows,
            **shared,
        )
    if len(x):
        pick_kernel[(len(x),)](
            value,
            ids,
            position,
            remaining,
            status,
            token,
            end_id,
            TILES=len(data),
            BLOCK=triton.next_power_of_2(len(data)),
            num_warps=4,
        )
    return token


def _head_case(model: str, rows: int, columns: int, kind: str) -> AotCase:
    return case(
        f"head_{model}_{kind}",
        head_kernel,
        {**sizes(rows, columns, kind, 0, 16, True), "OUTPUTS": rows},
        {"position_ptr": "*i64", "least_ptr": "*i64", "value_ptr": "*fp32", "id_ptr": "*i32"},
        {"end_id": "i32", "pad_id": "i32"},
    )


def _pick_case(model: str, rows: int) -> AotCase:
    tiles = 2 * triton.cdiv(rows, 2 * ROWS)
    pointers = {
        "value_ptr": "*fp32",
        "id_ptr": "*i32",
        **{name: STATE_TYPES[name] for name in ("position_ptr", "remaining_ptr", "status_ptr", "token_ptr")},
    }
    return AotCase(
        name=f"pick_{model}",
        kernel=pick_kernel,
        signature={**pointers, "end_id": "i32"},
        constexprs={"TILES": tiles, "BLOCK": triton.next_power_of_2(tiles)},
        aligned=tuple(pointers),
    )


AOT = [
    *(_head_case("7b", 64_001, 4096, kind) for kind in ("bf16", "int8")),
    *(_head_case("default", 4376, 192, kind) for kind in ("fp32", "fp16")),
    _pick_case("7b", 64_001),
    _pick_case("default", 4376),
]
