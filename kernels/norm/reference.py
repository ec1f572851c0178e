"""Eager normalisation (section 3)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """scale * x * rsqrt(mean(x^2) + eps) over the last axis of ``x [..., d]``, in x's dtype (section 3)."""
    return scale * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def add_rms_norm(x: Tensor, residual: Tensor, scale: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) for the new residual stream s = residual + x, both ``[..., d]`` and rounded to x's dtype."""
    total = residual + x
    return rms_norm(total, scale, eps), total


def rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``rms_norm`` wrt x ``[..., d]`` and scale ``[d]``, in fp32 (float64 for float64 input).

    grad_sum is added to x's gradient: what flows back through the residual stream of ``add_rms_norm``. With u the
    normalised x and g = grad * scale: grad x = (g - u * mean(g * u)) / rms, grad scale = sum over rows of grad * u.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    grads, rows = grad.to(wide), x.to(wide)
    inverse = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    unit = rows * inverse
    scaled = grads * scale.to(wide)
    grad_x = inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    if grad_sum is not None:
        grad_x = grad_x + grad_sum.to(wide)
    return grad_x.to(x.dtype), (grads * unit).flatten(0, -2).sum(0).to(scale.dtype)
