"""RMSNorm in Triton: a row a program, sums in fp32, so a row's bits never depend on the other rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase

ROWS_PER_PROGRAM = 32  # of the backward pass; fixed, so that the scale's gradient is summed in one order


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    scale_ptr,
    y_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + at, rounded, mask=inside)
        x = rounded.to(tl.float32)  # what the next addition will read is what is normalised
    inverse = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(y_ptr + row * WIDTH + at, (x * inverse * scale).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    grad_stride,
    grad_sum_stride,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad_scale = tl.zeros([BLOCK], tl.float32)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, rows)):
        x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
        unit = x * inverse
        grad_scale += grad * unit
        grad *= scale
        grad_x = inverse * (grad - unit * (tl.sum(grad * unit, 0) / WIDTH))
        if HAS_GRAD_SUM:
            grad_x += tl.load(grad_sum_ptr + row * grad_sum_stride + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * WIDTH + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * WIDTH + at, grad_scale, mask=inside)


def warps(block: int) -> int:
    """16 numbers a thread, between 1 and 16 warps."""
    return min(max(block // 512, 1), 16)


def _rows(x: Tensor) -> Tensor:
    """``x`` as rows ``[N, d]`` of adjacent numbers; a copy only where the strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _forward(x: Tensor, residual: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    rows, width = _rows(x), x.shape[-1]
    added = rows if residual is None else _rows(residual)
    y = torch.empty(x.shape, device=x.device, dtype=torch.promote_types(x.dtype, scale.dtype))
    total = None if residual is None else torch.empty(x.shape, device=x.device, dtype=x.dtype)
    block = triton.next_power_of_2(width)
    if x.numel():
        forward_kernel[(len(rows),)](
            rows,
            added,
            scale.contiguous(),
            y,
            y if total is None else total,
            rows.stride(0),
            added.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=warps(block),
        )
    return y, total


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _forward(x, None, scale, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total = _forward(x, residual, scale, eps)
    assert total is not None
    return y, total


def rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    rows, grads, width = _rows(x), _rows(grad), x.shape[-1]
    others = grads if grad_sum is None else _rows(grad_sum)
    grad_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    programs = triton.cdiv(len(rows), ROWS_PER_PROGRAM)
    partial = torch.empty((programs, width), device=x.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    if x.numel():
        backward_kernel[(programs,)](
            grads,
            others,
            rows,
            scale.contiguous(),
            grad_x,
            partial,
            len(rows),
            grads.stride(0),
            others.stride(0),
            rows.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            ROWS=ROWS_PER_PROGRAM,
            HAS_GRAD_SUM=grad_sum is not None,
            num_warps=warps(block),
        )
    return grad_x, partial.sum(0).to(scale.dtype)


def _aot() -> list[AotCase]:
    pointers = {"x_ptr": "*bf16", "scale_ptr": "*bf16"}
    cases = []
    for width in (4096, 3200, 192):  # the 7B, the 3B, the default model
        block = triton.next_power_of_2(width)
        for with_sum in (False, True):
            cases += [
                AotCase(
                    name=f"{'add_' if with_sum else ''}rms_norm_d{width}",
                    kernel=forward_kernel,
                    signature={
                        **pointers,
                        **dict.fromkeys(("residual_ptr", "y_ptr", "sum_ptr"), "*bf16"),
                        **dict.fromkeys(("x_stride", "residual_stride"), "i32"),
                        "eps": "fp32",
                    },
                    constexprs={"WIDTH": width, "BLOCK": block, "HAS_RESIDUAL": with_sum},
                    aligned=("x_ptr", "residual_ptr", "scale_ptr", "y_ptr", "sum_ptr", "x_stride", "residual_stride"),
                    num_warps=warps(block),
                ),
                AotCase(
                    name=f"{'add_' if with_sum else ''}rms_norm_backward_d{width}",
                    kernel=backward_kernel,
                    signature={
                        **pointers,
                        **dict.fromkeys(("grad_ptr", "grad_sum_ptr", "grad_x_ptr"), "*bf16"),
                        "partial_ptr": "*fp32",
                        **dict.fromkeys(("rows", "grad_stride", "grad_sum_stride", "x_stride"), "i32"),
                        "eps": "fp32",
                    },
                    constexprs={
                        "WIDTH": width,
                        "BLOCK": block,
                        "ROWS": ROWS_PER_PROGRAM,
                        "HAS_GRAD_SUM": with_sum,
                    },
                    aligned=(
                        *("grad_ptr", "grad_sum_ptr", "x_ptr", "scale_ptr", "grad_x_ptr", "partial_ptr"),
                        *("grad_stride", "grad_sum_stride", "x_stride"),
                    ),
                    num_warps=warps(block),
                ),
            ]
    return cases


AOT = _aot()
