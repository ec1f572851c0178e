"""``kinetok::fsq_encode``, ``fsq_decode``, ``fsq_quantize`` with its gradient, ``fsq_dequantize`` (section 2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.fsq import reference
from kinetok.kernels.ops import check_device, check_floats, check_whole, kernel_op, takes_op


@kernel_op
def _fsq_encode(x: Tensor, weight: Tensor | None, bias: Tensor | None, levels: Sequence[int]) -> Tensor:
    return reference.fsq_encode(x, weight, bias, levels)


@kernel_op
def _fsq_decode(indices: Tensor, weight: Tensor, bias: Tensor, levels: Sequence[int]) -> Tensor:
    return reference.fsq_decode(indices, weight, bias, levels)


@kernel_op
def _fsq_quantize(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    return reference.fsq_quantize(z, levels)


@kernel_op
def _fsq_quantize_backward(grad: Tensor, z: Tensor, levels: Sequence[int]) -> Tensor:
    return reference.fsq_quantize_backward(grad, z, levels)


@kernel_op
def _fsq_dequantize(indices: Tensor, levels: Sequence[int]) -> Tensor:
    return reference.fsq_dequantize(indices, levels)


@_fsq_encode.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, levels: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int32)


@_fsq_decode.register_fake
def _(indices: Tensor, weight: Tensor, bias: Tensor, levels: Sequence[int]) -> Tensor:
    return weight.new_empty(*indices.shape, weight.shape[0])


@_fsq_quantize.register_fake
def _(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    codes = z.new_empty(z.shape, dtype=torch.promote_types(z.dtype, torch.float32))
    return codes, z.new_empty(z.shape[:-1], dtype=torch.int32)


@_fsq_quantize_backward.register_fake
def _(grad: Tensor, z: Tensor, levels: Sequence[int]) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@_fsq_dequantize.register_fake
def _(indices: Tensor, levels: Sequence[int]) -> Tensor:
    return indices.new_empty(*indices.shape, len(levels), dtype=torch.float32)


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, _, _, ctx.levels = inputs
    ctx.save_for_backward(indices)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    rows = grad.flatten(0, -2)
    codes = _fsq_dequantize(indices, ctx.levels).flatten(0, -2).to(grad.dtype)
    return None, rows.T @ codes, rows.sum(0), None


def _save_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, ctx.levels = inputs
    ctx.save_for_backward(z)


def _quantize_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (z,) = ctx.saved_tensors
    return _fsq_quantize_backward(grad.contiguous(), z, ctx.levels), None


_fsq_decode.register_autograd(_decode_backward, setup_context=_save_decode)
_fsq_quantize.register_autograd(_quantize_backward, setup_context=_save_quantize)


def _check_levels(levels: Sequence[int]) -> None:
    if (
        not levels
        or any(level != int(level) for level in levels)
        or min(levels) < 2
        or torch.Size(levels).numel() >= 2**31
    ):
        raise UserError(f"levels: expected whole numbers of at least 2 whose product fits in int32, got {list(levels)}")


def _check_projection(weight: Tensor, bias: Tensor, shape: tuple[int, int]) -> None:
    if tuple(weight.shape) != shape or tuple(bias.shape) != shape[:1]:
        raise UserError(
            f"expected a projection of shape {list(shape)} and {shape[0]} biases, "
            f"got {list(weight.shape)} and {list(bias.shape)}"
        )


def _check_row(x: Tensor, levels: Sequence[int]) -> None:
    if x.shape[-1:] != (len(levels),):
        raise UserError(f"expected {len(levels)} numbers a row, one a level, got {list(x.shape[-1:])}")


def fsq_encode(x: Tensor, weight: Tensor | None, bias: Tensor | None, levels: Sequence[int]) -> Tensor:
    """Latents ``x [..., C]`` to int32 indices ``[...]``: projection, bound, rounding and index in one pass.

    ``weight [n, C]`` and ``bias [n]`` are those of project_in, n = len(levels); both None where C = n and there is none.
    fp32 inside (fp64 for fp64 on a CPU). No gradient. Raises ``UserError`` for shapes that do not fit.
    """
    _check_levels(levels)
    check_floats(x=x, weight=weight, bias=bias)
    check_device(x, weight, bias)
    if (weight is None) != (bias is None):
        raise UserError("expected both weight and bias of the projection, or neither")
    if weight is not None and bias is not None and x.ndim:
        _check_projection(weight, bias, (len(levels), x.shape[-1]))
    else:
        _check_row(x, levels)
    return (_fsq_encode if takes_op(x) else reference.fsq_encode)(x, weight, bias, levels)


def fsq_decode(indices: Tensor, weight: Tensor, bias: Tensor, levels: Sequence[int]) -> Tensor:
    """Integer indices ``[...]`` in [0, prod(levels)) to project_out's ``[..., C]`` in the dtype of ``weight [C, n]``.

    ``bias [C]``, n = len(levels); fp32 inside on a GPU. Differentiable in weight and bias. An index out of range gives
    numbers without meaning. Raises ``UserError`` for shapes that do not fit.
    """
    _check_levels(levels)
    check_whole(indices=indices)
    check_floats(weight=weight)
    check_device(indices, weight, bias)
    _check_projection(weight, bias, (weight.shape[0] if weight.ndim else 0, len(levels)))
    if bias.dtype != weight.dtype:
        raise UserError(f"expected weight and bias of one dtype, got {weight.dtype} and {bias.dtype}")
    return (_fsq_decode if takes_op(indices) else reference.fsq_decode)(indices, weight, bias, levels)


def fsq_quantize(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Quantise ``z [..., n]``, one number per level.

    Returns codes ``[..., n]`` (fp32, or fp64 for fp64 input; multiples of 1 / floor(l/2) in [-1, 1]) and int32 indices
    ``[...]``. Rounding is half to even. The gradient goes straight through the rounding only: tanh and the scale
    are differentiated. Raises ``UserError`` for another n.
    """
    _check_levels(levels)
    check_floats(z=z)
    _check_row(z, levels)
    codes, indices = (_fsq_quantize if takes_op(z) else reference.fsq_quantize)(z, levels)
    return codes, indices


def fsq_dequantize(indices: Tensor, levels: Sequence[int]) -> Tensor:
    """Integer indices ``[...]`` in [0, prod(levels)) to fp32 codes ``[..., n]``."""
    _check_levels(levels)
    check_whole(indices=indices)
    return (_fsq_dequantize if takes_op(indices) else reference.fsq_dequantize)(indices, levels)
