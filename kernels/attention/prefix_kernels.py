"""Attention over a text prefix and causal motion in tiles: scores and sums in fp32, log-sum-exp kept for the backward pass.

A block of queries meets the keys from the first, in one order, up to the last that it can see; so a row's bits depend on
its own numbers and lengths alone. Scores are in powers of two inside the kernels.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase

LN2 = tl.constexpr(math.log(2))


@triton.jit
def tile(ptr, at, stride, end, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``at [N]`` of a head as ``[N, BLOCK]``; 0 from ``end`` on and beyond the head's size."""
    d = tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + at[:, None] * stride + d, mask=(at[:, None] < end) & (d < HEAD_DIM), other=0.0)


@triton.jit
def store_tile(ptr, at, stride, end, x, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)[None, :]
    mask = (at[:, None] < end) & (d < HEAD_DIM)
    tl.store(ptr + at[:, None] * stride + d, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible(query, key, text, length):
    return ((key <= query) | ((query < text) & (key < text))) & (key < length)


@triton.jit
def row_lengths(text_ptr, lengths_ptr, row, positions):
    length = tl.minimum(tl.load(lengths_ptr + row), positions).to(tl.int32)
    return tl.minimum(tl.load(text_ptr + row), length).to(tl.int32), length


@triton.jit
def keys_end(start, text, length, QUERIES: tl.constexpr):
    """One past the last key that a block of queries from ``start`` on can see."""
    causal = tl.minimum(start + QUERIES, length)
    return tl.where(start < text, tl.maximum(causal, text), causal)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    text_ptr,
    lengths_ptr,
    o_ptr,
    lse_ptr,
    positions,
    heads,
    q_stride_row,
    q_stride_position,
    k_stride_row,
    k_stride_position,
    v_stride_row,
    v_stride_position,
    score_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start, owner = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    row, head = owner // heads, owner % heads
    text, length = row_lengths(text_ptr, lengths_ptr, row, positions)
    query = start + tl.arange(0, QUERIES)
    q = tile(q_ptr + row * q_stride_row + head * HEAD_DIM, query, q_stride_position, length, HEAD_DIM, BLOCK)
    k_ptr += row * k_stride_row + head * HEAD_DIM
    v_ptr += row * v_stride_row + head * HEAD_DIM
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, BLOCK], tl.float32)
    end = tl.where(start < length, keys_end(start, text, length, QUERIES), 0)
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        k = tile(k_ptr, key, k_stride_position, length, HEAD_DIM, BLOCK)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        scores = tl.where(visible(query[:, None], key[None, :], text, length), scores, -float("inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))  # finite: the first key is seen by every query
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tile(v_ptr, key, v_stride_position, length, HEAD_DIM, BLOCK)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
        largest = higher
    valid = query < length
    o = tl.where(valid[:, None], mixed / tl.where(valid, total, 1.0)[:, None], 0.0)
    out = o_ptr + (row * positions * heads + head) * HEAD_DIM
    store_tile(out, query, heads * HEAD_DIM, positions, o, HEAD_DIM, BLOCK)
    lse = tl.where(valid, (largest + tl.log2(tl.where(valid, total, 1.0))) * LN2, 0.0)
    tl.store(lse_ptr + owner * positions + query, lse, mask=query < positions)


@triton.jit
def query_gradient_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    text_ptr,
    lengths_ptr,
    o_ptr,
    lse_ptr,
    grad_q_ptr,
    inner_ptr,
    positions,
    heads,
    grad_stride_row,
    grad_stride_position,
    q_stride_row,
    q_stride_position,
    k_stride_row,
    k_stride_position,
    v_stride_row,
    v_stride_position,
    score_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start, owner = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    row, head = owner // heads, owner % heads
    text, length = row_lengths(text_ptr, lengths_ptr, row, positions)
    query = start + tl.arange(0, QUERIES)
    grad = tile(
        grad_ptr + row * grad_stride_row + head * HEAD_DIM, query, grad_stride_position, length, HEAD_DIM, BLOCK
    )
    own = (row * positions * heads + head) * HEAD_DIM
    o = tile(o_ptr + own, query, heads * HEAD_DIM, length, HEAD_DIM, BLOCK)
    inner = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(inner_ptr + owner * positions + query, inner, mask=query < positions)
    q = tile(q_ptr + row * q_stride_row + head * HEAD_DIM, query, q_stride_position, length, HEAD_DIM, BLOCK)
    lse = tl.load(lse_ptr + owner * positions + query, mask=query < length, other=0.0) / LN2
    k_ptr += row * k_stride_row + head * HEAD_DIM
    v_ptr += row * v_stride_row + head * HEAD_DIM
    grad_q = tl.zeros([QUERIES, BLOCK], tl.float32)
    end = tl.where(start < length, keys_end(start, text, length, QUERIES), 0)
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        k = tile(k_ptr, key, k_stride_position, length, HEAD_DIM, BLOCK)
        v = tile(v_ptr, key, v_stride_position, length, HEAD_DIM, BLOCK)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        seen = visible(query[:, None], key[None, :], text, length) & (query < length)[:, None]
        weights = tl.exp2(tl.where(seen, scores - lse[:, None], -float("inf")))
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - inner[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    store_tile(grad_q_ptr + own, query, heads * HEAD_DIM, positions, grad_q * (score_scale * LN2), HEAD_DIM, BLOCK)


@triton.jit
def key_gradient_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    text_ptr,
    lengths_ptr,
    lse_ptr,
    inner_ptr,
    grad_k_ptr,
    grad_v_ptr,
    positions,
    heads,
    grad_stride_row,
    grad_stride_position,
    q_stride_row,
    q_stride_position,
    k_stride_row,
    k_stride_position,
    v_stride_row,
    v_stride_position,
    score_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start, owner = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    row, head = owner // heads, owner % heads
    text, length = row_lengths(text_ptr, lengths_ptr, row, positions)
    key = start + tl.arange(0, KEYS)
    k = tile(k_ptr + row * k_stride_row + head * HEAD_DIM, key, k_stride_position, length, HEAD_DIM, BLOCK)
    v = tile(v_ptr + row * v_stride_row + head * HEAD_DIM, key, v_stride_position, length, HEAD_DIM, BLOCK)
    q_ptr += row * q_stride_row + head * HEAD_DIM
    grad_ptr += row * grad_stride_row + head * HEAD_DIM
    grad_k = tl.zeros([KEYS, BLOCK], tl.float32)
    grad_v = tl.zeros([KEYS, BLOCK], tl.float32)
    end = tl.where(start < length, length, 0)
    for first in range(tl.where(start < text, 0, start // QUERIES * QUERIES), end, QUERIES):
        query = first + tl.arange(0, QUERIES)
        q = tile(q_ptr, query, q_stride_position, length, HEAD_DIM, BLOCK)
        grad = tile(grad_ptr, query, grad_stride_position, length, HEAD_DIM, BLOCK)
        lse = tl.load(lse_ptr + owner * positions + query, mask=query < length, other=0.0) / LN2
        inner = tl.load(inner_ptr + owner * positions + query, mask=query < length, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * score_scale
        seen = visible(query[None, :], key[:, None], text, length) & (query < length)[None, :]
        weights = tl.exp2(tl.where(seen, scores - lse[None, :], -float("inf")))
        grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - inner[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    own = (row * positions * heads + head) * HEAD_DIM
    store_tile(grad_k_ptr + own, key, heads * HEAD_DIM, positions, grad_k * (score_scale * LN2), HEAD_DIM, BLOCK)
    store_tile(grad_v_ptr + own, key, heads * HEAD_DIM, positions, grad_v, HEAD_DIM, BLOCK)


def tiles(kernel: triton.JITFunction, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages by kernel, found by compiling: none keeps numbers in local memory on any architecture.

    A tile of 64 rows uses a warpgroup's matrix instructions on sm_90. fp32 products run on the ordinary units.
    """
    if dtype == torch.float32:
        return {"QUERIES": 32, "KEYS": 32, "num_warps": 8 if head_dim > 32 else 4, "num_stages": 1}
    if kernel is forward_kernel:
        keys, stages = (32, 2) if head_dim <= 32 else (64, 3) if head_dim <= 64 else (64, 2)
        return {"QUERIES": 64, "KEYS": keys, "num_warps": 4, "num_stages": stages}
    return {"QUERIES": 64, "KEYS": 64, "num_warps": 8 if head_dim > 64 else 4, "num_stages": 2}


def _heads_adjacent(x: Tensor) -> Tensor:
    """``x [B, T, H, hd]`` with the heads of a position side by side; a copy only where they are not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _shared(kernel: triton.JITFunction, q: Tensor) -> dict[str, int | str]:
    head_dim = q.shape[3]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK": max(triton.next_power_of_2(head_dim), 16),
        "PRECISION": "ieee",
        **tiles(kernel, head_dim, q.dtype),
    }


def _score_scale(head_dim: int) -> float:
    return math.log2(math.e) / math.sqrt(head_dim)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    rows, positions, heads, head_dim = q.shape
    o = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty((rows, heads, positions), device=q.device, dtype=torch.float32)
    if q.numel():
        q, k, v = map(_heads_adjacent, (q, k, v))
        shared = _shared(forward_kernel, q)
        forward_kernel[(triton.cdiv(positions, shared["QUERIES"]), rows * heads)](
            q,
            k,
            v,
            text_lengths.contiguous(),
            lengths.contiguous(),
            o,
            lse,
            positions,
            heads,
            *(stride for x in (q, k, v) for stride in x.stride()[:2]),
            _score_scale(head_dim),
            **shared,
        )
    return o, lse


def prefix_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, positions, heads, head_dim = q.shape
    grads = [torch.empty(q.shape, device=q.device, dtype=q.dtype) for _ in range(3)]
    inner = torch.empty_like(lse)
    if q.numel():
        grad, q, k, v = map(_heads_adjacent, (grad, q, k, v))
        text_lengths, lengths = text_lengths.contiguous(), lengths.contiguous()
        strides = [stride for x in (grad, q, k, v) for stride in x.stride()[:2]]
        given = (grad, q, k, v, text_lengths, lengths)
        sizes = (positions, heads, *strides, _score_scale(head_dim))
        shared = _shared(query_gradient_kernel, q)
        query_gradient_kernel[(triton.cdiv(positions, shared["QUERIES"]), rows * heads)](
            *given, o, lse, grads[0], inner, *sizes, **shared
        )
        shared = _shared(key_gradient_kernel, q)
        key_gradient_kernel[(triton.cdiv(positions, shared["KEYS"]), rows * heads)](
            *given, lse, inner, *grads[1:], *sizes, **shared
        )
    return grads[0], grads[1], grads[2]


def _aot() -> list[AotCase]:
    cases = []
    kernels = {
        "prefix_attention": forward_kernel,
        "prefix_attention_query_gradient": query_gradient_kernel,
        "prefix_attention_key_gradient": key_gradient_kernel,
    }
    for head_dim in (128, 100, 64, 32):  # the 7B, the 3B, the paper's smaller models, the default model
        for dtype in (torch.bfloat16, torch.float32):
            for name, kernel in kernels.items():
                if dtype == torch.float32 and head_dim > 64 and kernel is not forward_kernel:
                    continue  # trained in bf16; in fp32 these are right, but keep numbers in local memory
                sizes = tiles(kernel, head_dim, dtype)
                numbers = [argument for argument in kernel.arg_names if argument.islower()]
                types = {argument: "i32" for argument in numbers} | {"score_scale": "fp32"}
                types |= {argument: _pointer(argument, dtype) for argument in numbers if argument.endswith("_ptr")}
                cases.append(
                    AotCase(
                        name=f"{name}{'_float32' if dtype == torch.float32 else ''}_hd{head_dim}",
                        kernel=kernel,
                        signature=types,
                        constexprs={
                            "HEAD_DIM": head_dim,
                            "BLOCK": triton.next_power_of_2(head_dim),
                            "QUERIES": sizes["QUERIES"],
                            "KEYS": sizes["KEYS"],
                            "PRECISION": "ieee",
                        },
                        aligned=tuple(a for a in numbers if a.endswith("_ptr") or "_stride_" in a),
                        num_warps=sizes["num_warps"],
                        num_stages=sizes["num_stages"],
                        is_matmul=dtype == torch.bfloat16,
                        warpgroup=dtype == torch.bfloat16,
                    )
                )
    return cases


def _pointer(argument: str, dtype: torch.dtype) -> str:
    if argument in ("text_ptr", "lengths_ptr"):
        return "*i64"
    return "*fp32" if dtype == torch.float32 or argument in ("lse_ptr", "inner_ptr") else "*bf16"


AOT = _aot()
