"""Eager gated activation (section 3)."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up ``[..., F]`` of ``x [..., 2 F]``, whose halves are gate and up; silu(g) = g / (1 + exp(-g))."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``swiglu`` wrt ``x [..., 2 F]``, in fp32 (float64 for float64 input), for ``grad [..., F]``.

    With s = 1 / (1 + exp(-gate)): d up = grad * gate * s, d gate = grad * up * s * (1 + gate * (1 - s)).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = x.to(wide).chunk(2, dim=-1)
    grad = grad.to(wide)
    share = gate.sigmoid()
    slope = share * (1 + gate * (1 - share))
    return torch.cat((grad * up * slope, grad * gate * share), dim=-1).to(x.dtype)
