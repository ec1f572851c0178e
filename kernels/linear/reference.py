"""Eager product with a packed weight: the weight unpacked, everything in fp32."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kinetok.kernels.linear.packing import dequantise


def packed_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    counters: Tensor,
    kind: str,
    group: int,
    rows: int,
    eps: float | None,
    residual: Tensor | None,
    swiglu: bool,
    wide: bool,
) -> Tensor:
    """``x [B, K]`` times the packed weight's first ``rows`` rows; see ``linear``. wide: fp32 out instead of x's dtype."""
    values = x.float()
    weight = dequantise(data, scale, kind, group)[:rows, : x.shape[1]]
    # One product a row: a single one of all rows would sum in an order that depends on how many there are.
    y = torch.bmm(values[:, None], weight.T.expand(x.shape[0], -1, -1))[:, 0]
    if eps is not None:
        y = y * torch.rsqrt(values.square().mean(1, keepdim=True) + eps)
    if swiglu:
        gate, up = y.unflatten(1, (-1, 2)).unbind(2)
        y = F.silu(gate) * up
    if residual is not None:
        y = residual.float() + y
    return y if wide else y.to(x.dtype)
