"""Eager normalisation."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """scale * x * rsqrt(mean(x^2) + eps) over the last axis of ``x [..., d]``, in x's dtype (section 3)."""
    return scale * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
