"""Registration of the gated activation and its checked public function."""

from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.gating import reference
from kinetok.kernels.ops import check_floats, kernel_op, takes_op

_swiglu = kernel_op(reference.swiglu)
_swiglu_backward = kernel_op(reference.swiglu_backward)


@_swiglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_swiglu_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_save)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up ``[..., F]`` of ``x [..., 2 F]``, whose halves are gate and up, with its gradient (section 3).

    The Triton kernels compute in fp32 and round once. They keep x alone for the backward pass and compute silu again
    there; the definition, which eager CPU code runs, keeps silu(gate) as well and is faster on a CPU at small widths.
    Raises ``UserError`` for an odd last axis and other dtypes than floats.
    """
    if x.ndim == 0 or x.shape[-1] % 2:
        raise UserError(f"expected x [..., 2 F] of gate and up, got {list(x.shape)}")
    check_floats(x=x)
    return (_swiglu if takes_op(x) else reference.swiglu)(x)
