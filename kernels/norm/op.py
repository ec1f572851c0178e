"""Registration of the normalisations and their checked public functions."""

from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.norm import reference
from kinetok.kernels.ops import check_device, check_floats, kernel_op, takes_op

_rms_norm = kernel_op(reference.rms_norm)
_add_rms_norm = kernel_op(reference.add_rms_norm)
_rms_norm_backward = kernel_op(reference.rms_norm_backward)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@_rms_norm.register_fake
def _(x: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    return _contiguous(x, torch.promote_types(x.dtype, scale.dtype))


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, scale: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    return _contiguous(x, torch.promote_types(x.dtype, scale.dtype)), _contiguous(x, x.dtype)


@_rms_norm_backward.register_fake
def _(grad: Tensor, grad_sum: Tensor | None, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _contiguous(x, x.dtype), torch.empty_like(scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_rms_norm_backward(grad, None, *ctx.saved_tensors, ctx.eps), None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, scale, ctx.eps = inputs
    ctx.save_for_backward(output[1], scale)


def _backward_add(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_scale = _rms_norm_backward(grad, grad_sum, *ctx.saved_tensors, ctx.eps)
    return grad_x, grad_x, grad_scale, None


_rms_norm.register_autograd(_backward, setup_context=_save)
_add_rms_norm.register_autograd(_backward_add, setup_context=_save_add)


def _check(x: Tensor, scale: Tensor) -> None:
    if x.ndim == 0 or scale.ndim != 1 or x.shape[-1] != scale.shape[0]:
        raise UserError(f"expected x [..., d] and scale [d], got {list(x.shape)} and {list(scale.shape)}")
    check_floats(x=x, scale=scale)


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """scale * x * rsqrt(mean(x^2) + eps) over the last axis of ``x [..., d]``, with gradients wrt x and scale (section 3).

    The result has the wider of the two dtypes. The definition computes in x's dtype, rounding after each step; the
    Triton kernel computes in fp32 and rounds once. A row's bits do not depend on the other rows.
    Raises ``UserError`` where scale is not ``[d]``, and for other dtypes than floats and tensors on two devices.
    """
    _check(x, scale)
    check_device(x, scale)
    return (_rms_norm if takes_op(x) else reference.rms_norm)(x, scale, eps)


def add_rms_norm(x: Tensor, residual: Tensor, scale: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) for the new residual stream s = residual + x, both ``[..., d]`` of one dtype; with gradients.

    s is rounded to x's dtype and then normalised as ``rms_norm`` does it, in one pass over the memory.
    Raises ``UserError`` where x and residual differ in shape or dtype, or scale is not ``[d]``.
    """
    _check(x, scale)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise UserError(
            f"expected x and residual of one shape and dtype, got {list(x.shape)} {x.dtype} "
            f"and {list(residual.shape)} {residual.dtype}"
        )
    check_device(x, residual, scale)
    return (_add_rms_norm if takes_op(x) else reference.add_rms_norm)(x, residual, scale, eps)
