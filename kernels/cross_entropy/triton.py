"""The softmax part of the cross-entropy in Triton: a row a program, the gradient written over the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.aot import AotCase
from kinetok.kernels.cross_entropy.chunks import ALIGNED, in_chunks

BLOCK, WARPS = 4096, 8  # two 16-byte loads of bf16 a thread
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # below every logit, and finite: -inf minus -inf would be NaN


@triton.jit
def softmax_kernel(
    logits_ptr, targets_ptr, losses_ptr, classes, stride, BLOCK: tl.constexpr, WITH_GRADIENTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    chosen = tl.load(logits_ptr + target).to(tl.float32)
    at = tl.arange(0, BLOCK)
    # A maximum and a sum for each place of the block, joined once at the end: no reduction inside the loop.
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        inside = start + at < classes
        x = tl.load(logits_ptr + start + at, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        total = total * tl.exp2((largest - higher) * LOG2_E) + tl.exp2((x - higher) * LOG2_E)
        largest = higher
    peak = tl.max(largest, 0)
    normaliser = tl.sum(total * tl.exp2((largest - peak) * LOG2_E), 0)
    # The difference first: large logits are exact to fewer digits than their sum's logarithm.
    tl.store(losses_ptr + row, (peak - chosen) + tl.log2(normaliser) * LN_2)
    if WITH_GRADIENTS:
        inverse = 1.0 / normaliser
        for start in range(0, classes, BLOCK):
            inside = start + at < classes
            x = tl.load(logits_ptr + start + at, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp2((x - peak) * LOG2_E) * inverse - tl.where(start + at == target, 1.0, 0.0)
            tl.store(logits_ptr + start + at, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def softmax(logits: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
    losses = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    softmax_kernel[(len(logits),)](
        logits,
        targets,
        losses,
        logits.shape[1],
        logits.stride(0),
        BLOCK=BLOCK,
        WITH_GRADIENTS=with_gradients,
        num_warps=WARPS,
    )
    return losses


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if hidden.dtype == torch.float64:
        raise UserError("expected hidden in bf16, fp16 or fp32 on a GPU, got fp64: its softmax is computed in fp32")
    return in_chunks(hidden, weight, targets, ignored, with_gradients, softmax)


AOT = [
    AotCase(
        name=f"cross_entropy_{'gradients' if with_gradients else 'loss'}_{dtype}",
        kernel=softmax_kernel,
        signature={
            "logits_ptr": f"*{dtype}",
            "targets_ptr": "*i64",
            "losses_ptr": "*fp32",
            "classes": "i32",
            "stride": "i32",
        },
        constexprs={"BLOCK": BLOCK, "WITH_GRADIENTS": with_gradients},
        aligned=("logits_ptr", "targets_ptr", "losses_ptr", "stride"),
        num_warps=WARPS,
    )
    for dtype in ("bf16", "fp32")
    for with_gradients in (False, True)
]
assert ALIGNED % 16 == 0
