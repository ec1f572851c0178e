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

    Computed in fp32 (float64 for float64 input) and cast back to x's dtype.
    """
    cos, sin = table[:, :, None].unbind(-1)
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def apply_rotary_backward(grad: Tensor, table: Tensor) -> Tensor:
    """The gradient wrt x: a rotation is undone by its negative angle."""
    cos, sin = table.unbind(-1)
    return apply_rotary(grad, torch.stack((cos, -sin), dim=-1))


def rotary_kv_write(
    qkv: Tensor, table: Tensor, starts: Tensor, k_cache: Tensor, v_cache: Tensor, kv_scale: Tensor | None = None
) -> Tensor:
    """Rotated q ``[B, T, H, hd]`` of ``qkv [B, T, 3, H, hd]``; rotated k and v go to ``k_cache, v_cache [B, H, S, hd]``.

    Token t of row b takes position ``starts[b] + t`` (starts ``[B]`` integer) and ``table [B or 1, T, hd / 2, 2]``.
    A float8_e4m3fn cache holds k / kv_scale[0] and v / kv_scale[1], ``kv_scale [2, B, H]``, clamped to +-448.
    """
    heads = qkv.shape[3]
    q, k = apply_rotary(qkv[:, :, :2].flatten(2, 3), table).split(heads, dim=2)
    rows = torch.arange(len(qkv), device=qkv.device)[:, None]
    at = starts[:, None] + torch.arange(qkv.shape[1], device=qkv.device)
    for part, (cache, value) in enumerate(((k_cache, k), (v_cache, qkv[:, :, 2]))):
        if kv_scale is None:
            cache[rows, :, at] = value.to(cache.dtype)
        else:
            codes = (value.float() / kv_scale[part, :, None, :, None]).clamp(-448, 448).to(cache.dtype)
            cache.view(torch.uint8)[rows, :, at] = codes.view(torch.uint8)
    return q.contiguous()
