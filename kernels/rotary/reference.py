"""Eager rotary position code over interleaved pairs (section 3)."""

from typing import Literal

import torch
from torch import Tensor

BASE = 10000


def rotary_table(positions: int, head_dim: int, kind: Literal["fp32", "bf16"] = "fp32") -> Tensor:
    """Cosines and sines ``[positions, head_dim / 2, 2]`` in fp32: angle = position * 10000^(-2m / head_dim).

    "bf16" computes positions, frequencies and their products in bf16 and rounds the result to fp16, as a pure-bf16
    run of the reference does: its positions above 256 are even, and some entries are plainly wrong.
    """
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    frequency = 1.0 / (BASE ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim))
    angle = torch.outer(torch.arange(positions, dtype=dtype), frequency)
    if kind == "fp32":
        return torch.stack((angle.cos(), angle.sin()), dim=-1)
    return torch.stack((angle.float().cos(), angle.float().sin()), dim=-1).half().float()


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (2m, 2m + 1) of ``x [B, T, H, head_dim]`` by ``table [B or 1, T, head_dim / 2, 2]``.

    Computed in fp32 and cast back to x's dtype.
    """
    cos, sin = table[:, :, None, :, 0], table[:, :, None, :, 1]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
