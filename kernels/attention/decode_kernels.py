"""One query a row and head over a slab of keys and values: a part per 64 positions, then one sum of the parts.

A part covers the same positions whatever the batch, the capacity or the other rows' lengths, and the parts of a row are
added in one order, so a row's bits depend on its own numbers and length alone.

Every row has a program a head for each part of the caches given, and one whose part is beyond the row's length returns at
once. In a 7B with 512 positions that are 256 programs a row and layer, of which a row of 170 positions needs 96:
nothing for one row, 10,000 idle programs a layer for 64. So a step hands over the first positions of the slab alone, as many
as its longest row needs, in powers of two.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase
from kinetok.kernels.float8 import float8_to_float32, rows_adjacent
from kinetok.kernels.ops import cache_positions

PART = 64  # positions; 300 of them in a 7B make 160 programs for one row, enough to fill a large GPU
LEAST_PARTS = 8  # that are added as one tree: with as many as there are, the order would change with the capacity


def warps(float8: bool) -> int:
    """So that a thread has some 128 bytes of keys, and as many of values, on their way at once."""
    return 2 if float8 else 4


@triton.jit
def as_float32(x, FLOAT8: tl.constexpr):
    return float8_to_float32(x) if FLOAT8 else x.to(tl.float32)


@triton.jit
def part_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    scale_ptr,
    part_ptr,
    weight_ptr,
    heads,
    capacity,
    q_stride_row,
    scale_stride_part,
    score_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    owner, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = owner // heads, owner % heads
    length = tl.minimum(tl.load(lengths_ptr + row), capacity)
    if part * PART >= length:
        return
    at, d = part * PART + tl.arange(0, PART), tl.arange(0, BLOCK)
    seen = at < length
    slot = (owner * capacity + at[:, None]) * HEAD_DIM + d[None, :]
    mask = seen[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + slot, mask=mask, other=0)
    v = tl.load(v_ptr + slot, mask=mask, other=0)
    q = tl.load(q_ptr + row * q_stride_row + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    if FLOAT8:
        score_scale *= tl.load(scale_ptr + owner)
    scores = tl.sum(as_float32(k, FLOAT8) * q[None, :], 1) * score_scale
    scores = tl.where(seen, scores, -float("inf"))
    largest = tl.max(scores, 0)
    weights = tl.exp2(scores - largest)
    total = tl.sum(weights, 0)
    mixed = tl.sum(as_float32(v, FLOAT8) * weights[:, None], 0) / total
    if FLOAT8:
        mixed *= tl.load(scale_ptr + scale_stride_part + owner)
    out = owner * tl.num_programs(1) + part
    tl.store(part_ptr + out * HEAD_DIM + d, mixed, mask=d < HEAD_DIM)
    tl.store(weight_ptr + out, largest + tl.log2(total))


@triton.jit
def sum_kernel(
    part_ptr,
    weight_ptr,
    lengths_ptr,
    o_ptr,
    heads,
    capacity,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    owner = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + owner // heads), capacity)
    part, d = tl.arange(0, PARTS), tl.arange(0, BLOCK)
    used = part * PART < length
    mask = used[:, None] & (d < HEAD_DIM)[None, :]
    mixed = tl.load(part_ptr + (owner * parts + part[:, None]) * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + owner * parts + part, mask=used, other=-float("inf"))
    weight = tl.where(used, tl.exp2(weight - tl.max(weight, 0)), 0.0)
    total = tl.sum(weight, 0)
    o = tl.sum(mixed * weight[:, None], 0) / tl.where(length > 0, total, 1.0)
    tl.store(o_ptr + owner * HEAD_DIM + d, o.to(o_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, kv_scale: Tensor | None = None
) -> Tensor:
    rows, heads, head_dim = q.shape
    capacity, slab = k_cache.shape[2], cache_positions(k_cache)
    o = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    if not q.numel() or not capacity:
        return o.zero_()
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        q = q.contiguous()
    lengths, float8 = lengths.contiguous(), kv_scale is not None
    kv_scale = None if kv_scale is None else rows_adjacent(kv_scale)
    parts, block = triton.cdiv(capacity, PART), triton.next_power_of_2(head_dim)
    part = torch.empty((rows * heads, parts, head_dim), device=q.device, dtype=torch.float32)
    weight = torch.empty((rows * heads, parts), device=q.device, dtype=torch.float32)
    part_kernel[(rows * heads, parts)](
        q,
        k_cache.view(torch.uint8) if float8 else k_cache,
        v_cache.view(torch.uint8) if float8 else v_cache,
        lengths,
        weight if kv_scale is None else kv_scale,
        part,
        weight,
        heads,
        slab,
        q.stride(0),
        0 if kv_scale is None else kv_scale.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        HEAD_DIM=head_dim,
        BLOCK=block,
        PART=PART,
        FLOAT8=float8,
        num_warps=warps(float8),
    )
    sum_kernel[(rows * heads,)](
        part,
        weight,
        lengths,
        o,
        heads,
        capacity,
        parts,
        HEAD_DIM=head_dim,
        BLOCK=block,
        PART=PART,
        PARTS=max(LEAST_PARTS, triton.next_power_of_2(parts)),
        num_warps=1,
    )
    return o


def _aot() -> list[AotCase]:
    cases = []
    for head_dim in (128, 100, 64, 32):  # the 7B, the 3B, the paper's smaller models, the default model
        sizes = {"HEAD_DIM": head_dim, "BLOCK": triton.next_power_of_2(head_dim), "PART": PART}
        for suffix, kind, cache in (
            ("", "*bf16", "*bf16"),
            ("_float32", "*fp32", "*fp32"),
            ("_float8", "*bf16", "*u8"),
        ):
            cases.append(
                AotCase(
                    name=f"decode_attention{suffix}_hd{head_dim}",
                    kernel=part_kernel,
                    signature={
                        "q_ptr": kind,
                        **dict.fromkeys(("k_ptr", "v_ptr"), cache),
                        "lengths_ptr": "*i64",
                        **dict.fromkeys(("scale_ptr", "part_ptr", "weight_ptr"), "*fp32"),
                        **dict.fromkeys(("heads", "capacity", "q_stride_row", "scale_stride_part"), "i32"),
                        "score_scale": "fp32",
                    },
                    constexprs={**sizes, "FLOAT8": cache == "*u8"},
                    aligned=("q_ptr", "k_ptr", "v_ptr", "part_ptr", "q_stride_row"),
                    num_warps=warps(cache == "*u8"),
                )
            )
        cases.append(
            AotCase(
                name=f"decode_attention_sum_hd{head_dim}",
                kernel=sum_kernel,
                signature={
                    **dict.fromkeys(("part_ptr", "weight_ptr"), "*fp32"),
                    "lengths_ptr": "*i64",
                    "o_ptr": "*bf16",
                    **dict.fromkeys(("heads", "capacity", "parts"), "i32"),
                },
                constexprs={**sizes, "PARTS": LEAST_PARTS},
                aligned=("part_ptr", "weight_ptr", "o_ptr"),
                num_warps=1,
            )
        )
    return cases


AOT = _aot()
