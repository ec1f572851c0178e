"""Finite scalar quantisation in plain torch (section 2): no codebook table is ever built."""

from collections.abc import Sequence
from functools import lru_cache
from math import atanh, prod

import torch
from torch import Tensor
from torch.nn import functional as F


@lru_cache(maxsize=64)
def level_constants(levels: tuple[int, ...]) -> tuple[list[float], list[float], list[float], list[int], list[int]]:
    """Per level: half range, offset, shift, half width, basis."""
    half = [(level - 1) * 1.001 / 2 for level in levels]
    offset = [0.5 if level % 2 == 0 else 0.0 for level in levels]
    shift = [atanh(o / h) for o, h in zip(offset, half, strict=True)]
    width = [level // 2 for level in levels]
    basis = [prod(levels[:j]) for j in range(len(levels))]
    return half, offset, shift, width, basis


def _vector(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` as a tensor beside ``like``, of ops that a decomposition can hold (``torch.tensor`` leaves detach_)."""
    return torch.cat([like.new_full((1,), value, dtype=dtype) for value in values])


def fsq_bound(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Squash ``z [..., n]`` into the open range of its levels: tanh(z + shift) * half - offset, in fp32 or fp64."""
    half, offset, shift, _, _ = level_constants(tuple(levels))
    z = z if z.dtype == torch.float64 else z.float()
    return torch.tanh(z + _vector(shift, z)) * _vector(half, z) - _vector(offset, z)


def _indices(rounded: Tensor, levels: Sequence[int]) -> Tensor:
    """Rounded values ``[..., n]``, from -floor(l/2) up, to int32 indices ``[...]``."""
    _, _, _, width, basis = level_constants(tuple(levels))
    digits = rounded.to(torch.int32) + _vector(width, rounded, torch.int32)
    return (digits * _vector(basis, rounded, torch.int32)).sum(-1, dtype=torch.int32)


def codes_to_indices(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Codes ``[..., n]`` in [-1, 1] to int32 indices ``[...]``; level 0 varies fastest."""
    width = level_constants(tuple(levels))[3]
    return _indices((codes * _vector(width, codes)).round(), levels)


def fsq_quantize(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``kinetok.kernels.fsq_quantize``: codes ``[..., n]`` and int32 indices ``[...]`` of ``z [..., n]``."""
    _, _, _, width, _ = level_constants(tuple(levels))
    bounded = fsq_bound(z, levels)
    rounded = bounded.detach().round()
    through = bounded + (rounded - bounded).detach() if bounded.requires_grad else rounded
    return through / _vector(width, bounded), _indices(rounded, levels)


def fsq_quantize_backward(grad: Tensor, z: Tensor, levels: Sequence[int]) -> Tensor:
    """Gradient of ``z [..., n]`` for that of the codes: grad * half / floor(l/2) * (1 - tanh(z + shift)^2)."""
    half, _, shift, width, _ = level_constants(tuple(levels))
    wide = z if z.dtype == torch.float64 else z.float()
    slope = 1 - torch.tanh(wide + _vector(shift, wide)).square()
    return (grad * slope * _vector([h / w for h, w in zip(half, width, strict=True)], wide)).to(z.dtype)


def fsq_dequantize(indices: Tensor, levels: Sequence[int]) -> Tensor:
    """``kinetok.kernels.fsq_dequantize``: fp32 codes ``[..., n]`` of integer indices ``[...]``."""
    _, _, _, width, basis = level_constants(tuple(levels))
    indices = indices.to(torch.int32)[..., None]
    digits = (indices // _vector(basis, indices)) % _vector(levels, indices)
    half = _vector(width, indices)
    return (digits - half).float() / half.float()


def fsq_encode(x: Tensor, weight: Tensor | None, bias: Tensor | None, levels: Sequence[int]) -> Tensor:
    """``kinetok.kernels.fsq_encode``: int32 indices ``[...]`` of ``x [..., C]``."""
    z = x
    if weight is not None and bias is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        z = F.linear(x.to(wide), weight.to(wide), bias.to(wide))
    return _indices(fsq_bound(z, levels).round(), levels)


def fsq_decode(indices: Tensor, weight: Tensor, bias: Tensor, levels: Sequence[int]) -> Tensor:
    """``kinetok.kernels.fsq_decode``: ``[..., C]`` of integer indices ``[...]``.

    One product a level, added in their order, so that the bits of a row do not depend on how many there are.
    """
    codes = fsq_dequantize(indices, levels).to(weight.dtype)
    out = bias.expand(*indices.shape, -1)
    for level in range(len(levels)):
        out = out + codes[..., level, None] * weight[:, level]
    return out


def fsq_perplexity(indices: Tensor, codebook: int) -> tuple[Tensor, Tensor]:
    """Perplexity exp(-sum p log(p + 1e-7)) over all indices, and the fraction of the codebook in use (both scalars).

    Codes that do not occur add nothing, so only those that do are counted: no one-hot of codebook width.
    """
    _, counts = indices.flatten().unique(return_counts=True)
    p = counts.float() / indices.numel()
    return torch.exp(-(p * torch.log(p + 1e-7)).sum()), torch.tensor(len(counts) / codebook, device=indices.device)
