"""Rotary position code in Triton: a position's heads a program, computed in fp32, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase
from kinetok.kernels.float8 import float32_to_float8, rows_adjacent

HEADS_PER_PROGRAM = 4
WARPS = 1


@triton.jit
def load_turns(turns_ptr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines and sines ``[1, BLOCK / 2]`` of one position."""
    at = tl.arange(0, BLOCK)
    return tl.split(tl.reshape(tl.load(turns_ptr + at, mask=at < HEAD_DIM, other=0.0), (1, BLOCK // 2, 2)))


@triton.jit
def rotate(x, cos, sin, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (HEADS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, BLOCK))


@triton.jit
def apply_kernel(
    x_ptr,
    table_ptr,
    y_ptr,
    positions,
    heads,
    x_stride_row,
    x_stride_position,
    table_stride_row,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    program = tl.program_id(0)
    row, position = (program // positions).to(tl.int64), program % positions
    head, at = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (at < HEAD_DIM)
    local = head * HEAD_DIM + at
    x = tl.load(x_ptr + row * x_stride_row + position * x_stride_position + local, mask=mask, other=0.0)
    cos, sin = load_turns(table_ptr + row * table_stride_row + position * HEAD_DIM, HEAD_DIM, BLOCK)
    y = rotate(x, cos, -sin if INVERSE else sin, HEADS, BLOCK)
    tl.store(y_ptr + program.to(tl.int64) * heads * HEAD_DIM + local, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def cached(x, scale_ptr, scale_at, known, cache_ptr, FLOAT8: tl.constexpr):
    """``x`` as the cache holds it."""
    if FLOAT8:
        scale = tl.load(scale_ptr + scale_at, mask=known, other=1.0)
        return float32_to_float8(tl.div_rn(x.to(tl.float32), tl.broadcast_to(scale, x.shape)))
    return x.to(cache_ptr.dtype.element_ty)


@triton.jit
def kv_write_kernel(
    qkv_ptr,
    turns_ptr,
    starts_ptr,
    k_cache_ptr,
    v_cache_ptr,
    scale_ptr,
    q_ptr,
    positions,
    heads,
    capacity,
    qkv_stride_row,
    qkv_stride_position,
    qkv_stride_part,
    turns_stride_row,
    scale_stride_part,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    program = tl.program_id(0)
    row, step = (program // positions).to(tl.int64), program % positions
    head, at = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (at < HEAD_DIM)
    local = head * HEAD_DIM + at
    source = qkv_ptr + row * qkv_stride_row + step * qkv_stride_position + local
    q = tl.load(source, mask=mask, other=0.0)
    k = tl.load(source + qkv_stride_part, mask=mask, other=0.0)
    v = tl.load(source + 2 * qkv_stride_part, mask=mask, other=0.0)
    cos, sin = load_turns(turns_ptr + row * turns_stride_row + step * HEAD_DIM, HEAD_DIM, BLOCK)
    q = rotate(q, cos, sin, HEADS, BLOCK).to(q_ptr.dtype.element_ty)
    k = rotate(k, cos, sin, HEADS, BLOCK).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + program.to(tl.int64) * heads * HEAD_DIM + local, q, mask=mask)
    position = tl.load(starts_ptr + row) + step
    owner, known = row * heads + head, head < heads
    slot = (owner * capacity + position) * HEAD_DIM + at
    mask &= (position >= 0) & (position < capacity)
    values = cached(v, scale_ptr + scale_stride_part, owner, known, v_cache_ptr, FLOAT8)
    tl.store(k_cache_ptr + slot, cached(k, scale_ptr, owner, known, k_cache_ptr, FLOAT8), mask=mask)
    tl.store(v_cache_ptr + slot, values, mask=mask)


def _heads_adjacent(x: Tensor) -> Tensor:
    """``x [..., H, hd]`` with the heads of a position side by side; a copy only where they are not."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _apply(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    rows, positions, heads, head_dim = x.shape
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if x.numel():
        x, table = _heads_adjacent(x), table.contiguous()
        apply_kernel[(rows * positions, triton.cdiv(heads, HEADS_PER_PROGRAM))](
            x,
            table,
            y,
            positions,
            heads,
            x.stride(0),
            x.stride(1),
            table.stride(0) if len(table) > 1 else 0,
            HEAD_DIM=head_dim,
            BLOCK=triton.next_power_of_2(head_dim),
            HEADS=HEADS_PER_PROGRAM,
            INVERSE=inverse,
            num_warps=WARPS,
        )
    return y


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    return _apply(x, table, inverse=False)


def apply_rotary_backward(grad: Tensor, table: Tensor) -> Tensor:
    return _apply(grad, table, inverse=True)


def rotary_kv_write(
    qkv: Tensor, table: Tensor, starts: Tensor, k_cache: Tensor, v_cache: Tensor, kv_scale: Tensor | None = None
) -> Tensor:
    rows, positions, _, heads, head_dim = qkv.shape
    q = torch.empty((rows, positions, heads, head_dim), device=qkv.device, dtype=qkv.dtype)
    float8 = kv_scale is not None
    if q.numel():
        kv_scale = None if kv_scale is None else rows_adjacent(kv_scale)
        qkv, table = _heads_adjacent(qkv), table.contiguous()
        kv_write_kernel[(rows * positions, triton.cdiv(heads, HEADS_PER_PROGRAM))](
            qkv,
            table,
            starts.contiguous(),
            k_cache.view(torch.uint8) if float8 else k_cache,
            v_cache.view(torch.uint8) if float8 else v_cache,
            table if kv_scale is None else kv_scale,
            q,
            positions,
            heads,
            k_cache.shape[2],
            qkv.stride(0),
            qkv.stride(1),
            qkv.stride(2),
            table.stride(0) if len(table) > 1 else 0,
            0 if kv_scale is None else kv_scale.stride(0),
            HEAD_DIM=head_dim,
            BLOCK=triton.next_power_of_2(head_dim),
            HEADS=HEADS_PER_PROGRAM,
            FLOAT8=float8,
            num_warps=WARPS,
        )
    return q


def _aot() -> list[AotCase]:
    cases = []
    for head_dim in (128, 100, 64, 32):  # the 7B, the 3B, the paper's smaller models, the default model
        sizes = {"HEAD_DIM": head_dim, "BLOCK": triton.next_power_of_2(head_dim), "HEADS": HEADS_PER_PROGRAM}
        strides = ("qkv_stride_row", "qkv_stride_position", "qkv_stride_part", "turns_stride_row", "scale_stride_part")
        for cache in ("*bf16", "*u8"):
            cases.append(
                AotCase(
                    name=f"rotary_kv_write{'_float8' if cache == '*u8' else ''}_hd{head_dim}",
                    kernel=kv_write_kernel,
                    signature={
                        **dict.fromkeys(("qkv_ptr", "q_ptr"), "*bf16"),
                        **dict.fromkeys(("turns_ptr", "scale_ptr"), "*fp32"),
                        **dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), cache),
                        "starts_ptr": "*i64",
                        **dict.fromkeys(("positions", "heads", "capacity", *strides), "i32"),
                    },
                    constexprs={**sizes, "FLOAT8": cache == "*u8"},
                    aligned=("qkv_ptr", "turns_ptr", "k_cache_ptr", "v_cache_ptr", "q_ptr", *strides[:3]),
                    num_warps=WARPS,
                )
            )
        cases.append(
            AotCase(
                name=f"apply_rotary_hd{head_dim}",
                kernel=apply_kernel,
                signature={
                    **dict.fromkeys(("x_ptr", "y_ptr"), "*bf16"),
                    "table_ptr": "*fp32",
                    **dict.fromkeys(("positions", "heads", "x_stride_row", "x_stride_position"), "i32"),
                    "table_stride_row": "i32",
                },
                constexprs={**sizes, "INVERSE": False},
                aligned=("x_ptr", "table_ptr", "y_ptr", "x_stride_row", "x_stride_position"),
                num_warps=WARPS,
            )
        )
    return cases


AOT = _aot()
