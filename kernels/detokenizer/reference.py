"""The decoder's ends in plain torch (section 2), channels-last; ``conv`` is every convolution of the tokenizer.

A convolution is given its padding as (left, right) frames: (taps - 1) * dilation on the left makes it causal, halves make
it centred, and none, (0, 0), is for a block that comes with the frames before it, as a stream has it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kinetok.kernels.fsq import reference as fsq
from kinetok.kernels.wavelet import reference as wavelet


def _taps(x: Tensor, taps: int, padding: Sequence[int], dilation: int, stride: int = 1) -> list[Tensor]:
    """For each tap what it meets of ``x [B, T, in]`` padded with zeros: ``[B, T', in]``."""
    x = F.pad(x, (0, 0, padding[0], padding[1]))
    reach = x.shape[1] - (taps - 1) * dilation
    return [x[:, k * dilation : k * dilation + reach : stride] for k in range(taps)]


def conv(x: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int], dilation: int, stride: int = 1) -> Tensor:
    """1-D convolution of ``x [B, T, in]`` with ``weight [out, taps, in]``: one matrix product over gathered taps."""
    if weight.shape[1] == 1 and stride == 1 and tuple(padding) == (0, 0):
        return F.linear(x, weight[:, 0], bias)
    columns = _taps(x, weight.shape[1], padding, dilation, stride)
    return F.linear(torch.cat(columns, dim=-1), weight.flatten(1), bias)


def fold_projection(weight: Tensor, project_weight: Tensor | None, project_bias: Tensor | None) -> Tensor:
    """The first convolution ``[out, taps, in]`` after project_out (``[in, n]``, ``[in]``) as one: ``[taps, n + 1, out]``.

    Row j < n of a tap weighs number j of a code, and row n is what the projection's bias gives a tap that meets a token.
    Without a projection (in = n) row n is 0. Exact but for rounding: both are linear, and nothing is between them.
    """
    if project_weight is None or project_bias is None:
        rows = F.pad(weight, (0, 1))
    else:
        rows = weight @ torch.cat((project_weight, project_bias[:, None]), dim=1)
    return rows.permute(1, 2, 0).contiguous()


def fsq_conv(
    indices: Tensor, table: Tensor, bias: Tensor, levels: Sequence[int], padding: Sequence[int], dilation: int
) -> Tensor:
    """``kinetok.kernels.detokenizer.fsq_conv``: relu(conv(project_out(codes))) of indices ``[B, T]``, ``[B, T', out]``.

    One product a tap and level, added in their order, so that the bits of a row do not depend on how many there are.
    """
    codes = fsq.fsq_dequantize(indices, levels).to(table.dtype)
    codes = F.pad(codes, (0, 1), value=1.0)  # meets row n of the table
    columns = _taps(codes, table.shape[0], padding, dilation)
    out = bias.expand(*columns[0].shape[:2], -1)
    for column, rows in zip(columns, table, strict=True):
        for level, row in enumerate(rows):
            out = torch.addcmul(out, column[..., level, None], row)
    return F.relu(out)


def conv_idwt(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    levels: int,
    padding: Sequence[int],
    dilation: int,
) -> Tensor:
    """``kinetok.kernels.detokenizer.conv_idwt``: idwt(conv(relu(x))) * scale + shift, ``[B, T' * 2^levels, d]``."""
    y = conv(F.relu(x), weight, bias, padding, dilation)
    if levels:
        y = wavelet.idwt(y, levels, "haar", 2.0, "packet", True)
    return y if scale is None or shift is None else torch.addcmul(shift, y, scale).to(x.dtype)
