"""``kinetok::fsq_conv`` and ``kinetok::conv_idwt`` and their checked public functions. Neither has a gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.detokenizer import reference
from kinetok.kernels.ops import check_device, check_floats, check_whole, kernel_op, takes_op

_fsq_conv = kernel_op(reference.fsq_conv)
_conv_idwt = kernel_op(reference.conv_idwt)


def _frames(length: int, taps: int, padding: Sequence[int], dilation: int) -> int:
    return length + padding[0] + padding[1] - (taps - 1) * dilation


@_fsq_conv.register_fake
def _(
    indices: Tensor, table: Tensor, bias: Tensor, levels: Sequence[int], padding: Sequence[int], dilation: int
) -> Tensor:
    batch, length = indices.shape
    return table.new_empty(batch, _frames(length, table.shape[0], padding, dilation), table.shape[2])


@_conv_idwt.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    levels: int,
    padding: Sequence[int],
    dilation: int,
) -> Tensor:
    batch, length, _ = x.shape
    outputs, taps, _ = weight.shape
    return x.new_empty(batch, _frames(length, taps, padding, dilation) * 2**levels, outputs // 2**levels)


def _check(x: Tensor, taps: int, padding: Sequence[int], dilation: int) -> None:
    if len(padding) != 2 or min(*padding, dilation) < 0:
        raise UserError(f"expected two paddings and a dilation of at least 0, got {tuple(padding)} and {dilation}")
    if _frames(x.shape[1], taps, padding, dilation) < 0:
        raise UserError(
            f"expected at least {(taps - 1) * dilation - sum(padding)} frames for {taps} taps, dilation {dilation} and "
            f"padding {tuple(padding)}, got {x.shape[1]}"
        )


def fsq_conv(
    indices: Tensor, table: Tensor, bias: Tensor, levels: Sequence[int], padding: Sequence[int], dilation: int = 1
) -> Tensor:
    """Tokens ``[B, T]`` through code, project_out, the decoder's first convolution and ReLU: ``[B, T', out]`` (section 2).

    indices int32 or int64 in [0, prod(levels)). ``table [taps, n + 1, out]`` is ``fold_projection`` of both layers'
    parameters, ``bias [out]`` the convolution's. padding is (left, right) tokens, T' = T + left + right - (taps - 1) *
    dilation; a padded place gives nothing, not even the projection's bias. A block of a stream brings the tokens before
    it and takes no padding. The result has the dtype of the table; fp32 inside on a GPU. A row's bits do not depend on
    the other rows. No gradient. Raises ``UserError`` for shapes that do not fit.
    """
    if indices.ndim != 2:
        raise UserError(f"expected indices [B, T], got {list(indices.shape)}")
    check_whole(indices=indices)
    check_floats(table=table)
    check_device(indices, table, bias)
    if bias.dtype != table.dtype:
        raise UserError(f"expected table and bias of one dtype, got {table.dtype} and {bias.dtype}")
    if table.ndim != 3 or not len(table) or table.shape[1] != len(levels) + 1 or bias.shape != table.shape[2:]:
        raise UserError(
            f"expected a table [taps, {len(levels) + 1}, out] and bias [out], got {list(table.shape)} "
            f"and {list(bias.shape)}"
        )
    _check(indices, table.shape[0], padding, dilation)
    return (_fsq_conv if takes_op(indices) else reference.fsq_conv)(indices, table, bias, levels, padding, dilation)


def conv_idwt(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    levels: int,
    padding: Sequence[int],
    dilation: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The decoder's end: ReLU, last convolution, inverse Haar patcher, then times scale plus shift (section 2).

    x ``[B, T, in]``, weight ``[d * 2^levels, taps, in]`` and bias ``[d * 2^levels]`` give frames ``[B, T' * 2^levels, d]``
    in x's dtype, with T' and padding as in ``fsq_conv``; levels 0 has no wavelet. scale and shift ``[d]`` (the
    data's std and mean), or neither. On a GPU the product of fp32 numbers takes three of TF32 (about fp32's precision)
    and fp32 sums, and a row's bits do not depend on the other rows. No gradient.
    Raises ``UserError`` for shapes that do not fit, and for fp64 on a GPU.
    """
    if (
        x.ndim != 3
        or weight.ndim != 3
        or not weight.shape[1]
        or x.shape[2] != weight.shape[2]
        or bias.shape != weight.shape[:1]
    ):
        raise UserError(
            f"expected x [B, T, in], weight [out, taps, in] and bias [out], got {list(x.shape)}, {list(weight.shape)} "
            f"and {list(bias.shape)}"
        )
    check_floats(x=x, scale=scale, shift=shift)
    check_device(x, weight, bias, scale, shift)
    if weight.dtype != x.dtype or bias.dtype != x.dtype:
        raise UserError(f"expected x, weight and bias of one dtype, got {x.dtype}, {weight.dtype} and {bias.dtype}")
    if not 0 <= levels <= 6 or weight.shape[0] % 2**levels:
        raise UserError(f"levels: expected 0 to 6 and a multiple of 2^levels outputs, got {levels}, {weight.shape[0]}")
    width = weight.shape[0] // 2**levels
    if (scale is None) != (shift is None) or any(t is not None and t.shape != (width,) for t in (scale, shift)):
        got = [None if t is None else list(t.shape) for t in (scale, shift)]
        raise UserError(f"expected both scale and shift of shape [{width}], or neither, got {got[0]} and {got[1]}")
    if x.is_cuda and x.dtype == torch.float64:
        raise UserError("conv_idwt: float64 runs on a CPU only")
    _check(x, weight.shape[1], padding, dilation)
    return (_conv_idwt if takes_op(x) else reference.conv_idwt)(
        x, weight, bias, scale, shift, levels, padding, dilation
    )
