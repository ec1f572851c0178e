"""Sampling in Triton, bit for bit by docs/numerics.md: fp32 operations rounded one by one, integers for every cut.

``sample_step`` takes one program a row, which goes over the row's scores several times; they stay in the L2 cache.
Thresholds are found two bits at a time by counting (top-k) or adding whole weights (top-p), so ties and the order of
sums cannot matter. ``greedy_step`` takes the maximum of each tile of the head where it is computed, then that of all tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase
from kinetok.kernels.linear.packing import BATCH, ROWS, split_k, tile_columns
from kinetok.kernels.linear.triton import TRITON_TYPE, adjacent, batch_tile, options, product, scaled, stages, workspace
from kinetok.kernels.sampling import arithmetic
from kinetok.kernels.sampling.state import ENDED, FAILED, FULL, RUNNING

LOG = tl.constexpr(arithmetic.LOG)
LN2_HIGH, LN2_LOW = tl.constexpr(arithmetic.LN2_HIGH), tl.constexpr(arithmetic.LN2_LOW)
SQRT_HALF_BITS = tl.constexpr(arithmetic.SQRT_HALF_BITS)
EXP2 = tl.constexpr(arithmetic.EXP2)
LOG2_E, LOWEST = tl.constexpr(arithmetic.LOG2_E), tl.constexpr(arithmetic.LOWEST)
SCALE_BIAS = tl.constexpr(127 + arithmetic.WEIGHT_BITS)
RUNNING_, ENDED_, FULL_, FAILED_ = (tl.constexpr(code) for code in (RUNNING, ENDED, FULL, FAILED))
SHARES = tl.constexpr(65536)
LAST_ID = tl.constexpr(2**31 - 1)
EXACT = {"enable_fp_fusion": False}
PASS = 4096  # numbers of a row that a program takes at once


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
def _advance(row, token, good, token_ptr, position_ptr, remaining_ptr, status_ptr, end_id):
    """Write the token of a running row, and its state after it."""
    token = tl.where(good, token.to(tl.int64), end_id)
    moved = (token != end_id).to(tl.int64)
    remaining = tl.load(remaining_ptr + row) - moved
    tl.store(token_ptr + row, token)
    tl.store(position_ptr + row, tl.load(position_ptr + row) + moved)
    tl.store(remaining_ptr + row, remaining)
    after = tl.where(moved == 0, ENDED_, tl.where(remaining == 0, FULL_, RUNNING_))
    tl.store(status_ptr + row, tl.where(good, after, FAILED_))


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
        _advance(row, token, good, token_ptr, position_ptr, remaining_ptr, status_ptr, end_id)


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
        _advance(row, token, good, token_ptr, position_ptr, remaining_ptr, status_ptr, end_id)


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
    x = adjacent(x)
    split, tile = split_k(rows, x.shape[1], kind), batch_tile(len(x), kind)
    token = torch.empty_like(position)
    value = torch.empty((len(x), len(data)), device=x.device, dtype=torch.float32)
    ids = torch.empty_like(value, dtype=torch.int32)
    partial = workspace(x, split, len(data), tile)
    for first in range(0, len(x), BATCH):
        some = x[first : first + BATCH]
        head_kernel[(triton.cdiv(len(some), tile), split, len(data))](
            some,
            data,
            data if scale is None else scale,
            position[first:],
            least[first:],
            value[first:],
            ids[first:],
            partial,
            counters,
            len(some),
            x.stride(0),
            0.0 if eps is None else eps,
            end_id,
            pad_id,
            OUTPUTS=rows,
            COLUMNS=x.shape[1],
            KIND=kind,
            GROUP=group,
            WIDTH=tile_columns(kind),
            SPLIT=split,
            BATCH_TILE=tile,
            NORMALISE=eps is not None,
            STAGES=stages(tile),
            **options(tile),
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


STATE_TYPES = {
    **dict.fromkeys(("seed_ptr", "request_ptr", "position_ptr", "least_ptr", "remaining_ptr", "token_ptr"), "*i64"),
    **dict.fromkeys(("status_ptr", "top_k_ptr", "share_ptr"), "*i32"),
    **dict.fromkeys(("inverse_temperature_ptr", "guidance_ptr"), "*fp32"),
}


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


def _head_case(model: str, rows: int, columns: int, kind: str) -> AotCase:
    pointers = {
        "x_ptr": TRITON_TYPE["bf16" if kind == "int8" else kind],
        "data_ptr": TRITON_TYPE[kind],
        "scale_ptr": "*fp32",
        "position_ptr": "*i64",
        "least_ptr": "*i64",
        "value_ptr": "*fp32",
        "id_ptr": "*i32",
        "partial_ptr": "*fp32",
        "counter_ptr": "*i32",
    }
    return AotCase(
        name=f"head_{model}_{kind}",
        kernel=head_kernel,
        signature={**pointers, **dict.fromkeys(("batch", "x_stride", "end_id", "pad_id"), "i32"), "eps": "fp32"},
        constexprs={
            "OUTPUTS": rows,
            "COLUMNS": columns,
            "KIND": kind,
            "GROUP": 0,
            "WIDTH": tile_columns(kind),
            "SPLIT": split_k(rows, columns, kind),
            "BATCH_TILE": 16,
            "NORMALISE": True,
            "STAGES": stages(16),
        },
        aligned=(*pointers, "x_stride"),
        is_matmul=kind != "fp32",
        warpgroup=kind != "fp32",
        options=options(16),
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
    *(_sample_case("7b", 64_001, guided) for guided in (False, True)),
    _sample_case("default", 4376, True),
    *(_head_case("7b", 64_001, 4096, kind) for kind in ("bf16", "int8")),
    *(_head_case("default", 4376, 192, kind) for kind in ("fp32", "fp16")),
    _pick_case("7b", 64_001),
    _pick_case("default", 4376),
]
