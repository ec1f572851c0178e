"""SwiGLU in Triton: a block of a row a program, in fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase

MOST = 1024  # numbers of a program
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward_kernel(x_ptr, y_ptr, width, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + at, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp2(-gate * LOG2_E)) * up
    tl.store(y_ptr + row * width + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad_ptr, x_ptr, grad_x_ptr, width, grad_stride, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + at, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp2(-gate * LOG2_E))
    slope = share * (1.0 + gate * (1.0 - share))
    kind = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + 2 * row * width + at, (grad * up * slope).to(kind), mask=inside)
    tl.store(grad_x_ptr + (2 * row + 1) * width + at, (grad * gate * share).to(kind), mask=inside)


def block(width: int) -> int:
    return min(triton.next_power_of_2(width), MOST)


def warps(block: int) -> int:
    """8 numbers a thread, which are 16 bytes in half precision."""
    return max(block // 256, 1)


def _rows(x: Tensor) -> Tensor:
    """``x`` as rows ``[N, d]`` of adjacent numbers; a copy only where the strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def swiglu(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), device=x.device, dtype=x.dtype)
    if y.numel():
        rows, size = _rows(x), block(width)
        grid = (len(rows), triton.cdiv(width, size))
        forward_kernel[grid](rows, y, width, rows.stride(0), BLOCK=size, num_warps=warps(size))
    return y


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    grad_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if grad_x.numel():
        rows, grads, size = _rows(x), _rows(grad), block(width)
        grid = (len(rows), triton.cdiv(width, size))
        strides = grads.stride(0), rows.stride(0)
        backward_kernel[grid](grads, rows, grad_x, width, *strides, BLOCK=size, num_warps=warps(size))
    return grad_x


def _aot() -> list[AotCase]:
    cases = []
    for width in (11008, 512):  # the 7B, the default model
        size = block(width)
        numbers = {"width": "i32", "x_stride": "i32"}
        forward = {**dict.fromkeys(("x_ptr", "y_ptr"), "*bf16"), **numbers}
        backward = {**dict.fromkeys(("grad_ptr", "x_ptr", "grad_x_ptr"), "*bf16"), **numbers, "grad_stride": "i32"}
        for name, kernel, signature in (
            (f"swiglu_f{width}", forward_kernel, forward),
            (f"swiglu_backward_f{width}", backward_kernel, backward),
        ):
            cases.append(
                AotCase(
                    name=name,
                    kernel=kernel,
                    signature=signature,
                    constexprs={"BLOCK": size},
                    aligned=tuple(signature),
                    num_warps=warps(size),
                )
            )
    return cases


AOT = _aot()
