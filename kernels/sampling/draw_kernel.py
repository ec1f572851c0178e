"""A draw from logits: one program a row, which goes over the row's scores several times; they stay in the L2 cache.

Thresholds are found two bits at a time by counting (top-k) or adding whole weights (top-p), so ties and the order of
sums cannot matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase
from kinetok.kernels.linear.product import adjacent
from kinetok.kernels.sampling import arithmetic
from kinetok.kernels.sampling.advance import LAST_ID, RUNNING_, STATE_TYPES, advance
from kinetok.kernels.sampling.numbers import EXACT, exp2_weight, gumbel

LOG2_E = tl.constexpr(arithmetic.LOG2_E)
SHARES = tl.constexpr(65536)
PASS = 4096  # numbers of a row that a program takes at once


@triton.jit
def _ordered(score):
    """Integers in the order of the scores; -0 lies next below 0."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_largest(score_ptr, k, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest of a row of scores."""
    found = tl.full((), -2147483648, tl.int64)
    for i in range(16):
        step = tl.full((), 1, tl.int64) << (30 - 2 * i)
        low, middle, high = (
            (found + step).to(tl.int32),
            (found + 2 * step).to(tl.int32),
            (found + 3 * step).to(tl.int32),
        )
        lows, middles, highs = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        for first in range(0, CLASSES, BLOCK):
            order = _ordered(tl.load(score_ptr + first + tl.arange(0, BLOCK)))
            lows += (order >= low).to(tl.int32)
            middles += (order >= middle).to(tl.int32)
            highs += (order >= high).to(tl.int32)
        digit = (tl.sum(lows, 0) >= k).to(tl.int64)
        digit += (tl.sum(middles, 0) >= k).to(tl.int64)
        digit += (tl.sum(highs, 0) >= k).to(tl.int64)
        found += digit * step
    bits = found.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _least_weight(weight_ptr, needed, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """The largest weight such that those at least as large add up to ``needed``."""
    found = tl.full((), 0, tl.int32)
    for i in range(13):
        step = tl.full((), 1, tl.int32) << (24 - 2 * i)
        low, middle, high = found + step, found + 2 * step, found + 3 * step
        lows, middles, highs = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
        for first in range(0, CLASSES, BLOCK):
            weight = tl.load(weight_ptr + first + tl.arange(0, BLOCK))
            lows += tl.where(weight >= low, weight, 0)
            middles += tl.where(weight >= middle, weight, 0)
            highs += tl.where(weight >= high, weight, 0)
        digit = (tl.sum(lows, 0) >= needed).to(tl.int32)
        digit += (tl.sum(middles, 0) >= needed).to(tl.int32)
        digit += (tl.sum(highs, 0) >= needed).to(tl.int32)
        found += digit * step
    return found


@triton.jit
def _weigh(score_ptr, weight_ptr, best, least_score, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Write the weights of a row's scores that are left; returns their sum."""
    sums = tl.zeros([BLOCK], tl.int64)
    for first in range(0, CLASSES, BLOCK):
        at = first + tl.arange(0, BLOCK)
        score = tl.load(score_ptr + at)
        weight = tl.where(score >= least_score, exp2_weight((score - best) * LOG2_E), 0)
        tl.store(weight_ptr + at, weight)
        sums += weight
    return tl.sum(sums, 0)


@triton.jit
def sample_kernel(
    logits_ptr,
    empty_ptr,
    seed_ptr,
    request_ptr,
    position_ptr,
    least_ptr,
    remaining_ptr,
    status_ptr,
    inverse_temperature_ptr,
    top_k_ptr,
    share_ptr,
    guidance_ptr,
    token_ptr,
    score_ptr,
    weight_ptr,
    logits_stride,
    empty_stride,
    end_id,
    pad_id,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_EMPTY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(status_ptr + row) != RUNNING_:
        tl.store(token_ptr + row, end_id.to(tl.int64))
    else:
        PADDED: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK * BLOCK
        scores, weights = score_ptr + row * PADDED, weight_ptr + row * PADDED
        position = tl.load(position_ptr + row)
        early = position < tl.load(least_ptr + row)
        inverse = tl.load(inverse_temperature_ptr + row)
        guidance = tl.load(guidance_ptr + row)
        highest, odd = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
        for first in range(0, CLASSES, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < CLASSES
            score = tl.load(logits_ptr + row * logits_stride + at, mask=inside, other=0.0).to(tl.float32)
            if HAS_EMPTY:
                empty = tl.load(empty_ptr + row * empty_stride + at, mask=inside, other=0.0).to(tl.float32)
                score = tl.where(guidance == 1.0, score, empty + (score - empty) * guidance)
            banned = ((at == end_id) & early) | (at == pad_id)
            score = tl.where(inside & (banned == 0), score, float("-inf"))
            odd |= (score != score).to(tl.int32)
            highest = tl.maximum(highest, score)
            tl.store(scores + at, tl.where(inverse > 0, score * inverse, score))
        best = tl.max(highest, 0)
        good = (tl.max(odd, 0) == 0) & (tl.abs(best) < float("inf"))
        tl.debug_barrier()  # what one thread wrote another reads
        least_score, least_weight = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
        if good & (inverse > 0):
            k, share = tl.load(top_k_ptr + row), tl.load(share_ptr + row)
            if (k > 0) & (k < CLASSES):
                least_score = _kth_largest(scores, k, CLASSES, BLOCK)
            if share < SHARES:
                total = _weigh(scores, weights, best * inverse, least_score, CLASSES, BLOCK)
                tl.debug_barrier()
                least_weight = _least_weight(weights, (total * share + (SHARES - 1)) >> 16, CLASSES, BLOCK)
        seed, request = tl.load(seed_ptr + row), tl.load(request_ptr + row)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        chosen = tl.full([BLOCK], LAST_ID, tl.int32)
        for first in range(0, CLASSES, BLOCK):
            at = first + tl.arange(0, BLOCK)
            score = tl.load(scores + at)
            stays = (score > float("-inf")) & (score >= least_score)
            if least_weight > 0:
                stays &= tl.load(weights + at) >= least_weight
            if inverse > 0:
                score += gumbel(first, seed, position, request, BLOCK)
            better = stays & (score > highest)
            highest = tl.where(better, score, highest)
            chosen = tl.where(better, at, chosen)
        token = tl.min(tl.where(highest == tl.max(highest, 0), chosen, LAST_ID), 0)
        advance(row, token, good, token_ptr, position_ptr, remaining_ptr, status_ptr, end_id)


def block(classes: int) -> int:
    return min(PASS, max(128, triton.next_power_of_2(classes)))


def warps(size: int) -> int:
    """Eight numbers a thread: with four the registers of the largest block would not do."""
    return max(1, size // 256)


def sample_step(
    logits: Tensor,
    empty: Tensor | None,
    seed: Tensor,
    request: Tensor,
    position: Tensor,
    least: Tensor,
    remaining: Tensor,
    status: Tensor,
    inverse_temperature: Tensor,
    top_k: Tensor,
    share: Tensor,
    guidance: Tensor,
    end_id: int,
    pad_id: int,
) -> Tensor:
    rows, classes = logits.shape
    logits = adjacent(logits)
    other = logits if empty is None else adjacent(empty)
    token = torch.empty_like(seed)
    size = block(classes)
    padded = triton.cdiv(classes, size) * size
    scores = torch.empty((rows, padded), device=logits.device, dtype=torch.float32)
    weights = torch.empty((rows, padded), device=logits.device, dtype=torch.int32)
    if rows:
        sample_kernel[(rows,)](
            logits,
            other,
            seed,
            request,
            position,
            least,
            remaining,
            status,
            inverse_temperature,
            top_k,
            share,
            guidance,
            token,
            scores,
            weights,
            logits.stride(0),
            other.stride(0),
            end_id,
            pad_id,
            CLASSES=classes,
            BLOCK=size,
            HAS_EMPTY=empty is not None,
            num_warps=warps(size),
            **EXACT,
        )
    return token


def _sample_case(model: str, classes: int, guided: bool) -> AotCase:
    pointers = {"logits_ptr": "*fp32", "empty_ptr": "*fp32", **STATE_TYPES, "score_ptr": "*fp32", "weight_ptr": "*i32"}
    return AotCase(
        name=f"sample_{model}{'_guided' if guided else ''}",
        kernel=sample_kernel,
        signature={**pointers, **dict.fromkeys(("logits_stride", "empty_stride", "end_id", "pad_id"), "i32")},
        constexprs={"CLASSES": classes, "BLOCK": block(classes), "HAS_EMPTY": guided},
        aligned=tuple(pointers),
        num_warps=warps(block(classes)),
        options=EXACT,
    )


AOT = [*(_sample_case("7b", 64_001, guided) for guided in (False, True)), _sample_case("default", 4376, True)]
