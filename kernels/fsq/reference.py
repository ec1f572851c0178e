"""Finite scalar quantisation in plain torch (section 2): no codebook table is ever built."""

from collections.abc import Sequence
from functools import lru_cache
from math import atanh, prod

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def _constants(levels: tuple[int, ...]) -> tuple[list[float], list[float], list[float], list[int], list[int]]:
    """Per level: half range, offset, shift, half width, basis."""
    half = [(level - 1) * 1.001 / 2 for level in levels]
    offset = [0.5 if level % 2 == 0 else 0.0 for level in levels]
    shift = [atanh(o / h) for o, h in zip(offset, half, strict=True)]
    width = [level // 2 for level in levels]
    basis = [prod(levels[:j]) for j in range(len(levels))]
    return half, offset, shift, width, basis


def fsq_bound(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Squash ``z [..., n]`` into the open range of its levels: tanh(z + shift) * half - offset, in fp32 or fp64."""
    half, offset, shift, _, _ = _constants(tuple(levels))
    z = z if z.dtype == torch.float64 else z.float()
    return torch.tanh(z + z.new_tensor(shift)) * z.new_tensor(half) - z.new_tensor(offset)


def codes_to_indices(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Codes ``[..., n]`` in [-1, 1] to int32 indices ``[...]``; level 0 varies fastest."""
    _, _, _, width, basis = _constants(tuple(levels))
    digits = (codes * codes.new_tensor(width)).round().to(torch.int32) + torch.tensor(
        width, dtype=torch.int32, device=codes.device
    )
    return (digits * torch.tensor(basis, dtype=torch.int32, device=codes.device)).sum(-1, dtype=torch.int32)


def fsq_quantize(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Quantise ``z [..., n]``, one number per level.

    Returns codes ``[..., n]`` (fp32, or fp64 for fp64 input; multiples of 1 / floor(l/2) in [-1, 1]) and int32 indices
    ``[...]``. Rounding is half to even. The gradient goes straight through the rounding only: tanh and the scale
    are differentiated.
    """
    _, _, _, width, _ = _constants(tuple(levels))
    bounded = fsq_bound(z, levels)
    rounded = bounded.detach().round()
    codes = (
        (bounded + (rounded - bounded).detach()) / bounded.new_tensor(width)
        if bounded.requires_grad
        else (rounded / bounded.new_tensor(width))
    )
    return codes, codes_to_indices(rounded / bounded.new_tensor(width), levels)


def fsq_dequantize(indices: Tensor, levels: Sequence[int]) -> Tensor:
    """Integer indices ``[...]`` in [0, prod(levels)) to fp32 codes ``[..., n]``."""
    _, _, _, width, basis = _constants(tuple(levels))
    make = lambda values: torch.tensor(values, dtype=torch.int32, device=indices.device)  # noqa: E731
    digits = (indices.to(torch.int32)[..., None] // make(basis)) % make(list(levels))
    return (digits - make(width)).float() / make(width).float()


def fsq_perplexity(indices: Tensor, codebook: int) -> tuple[Tensor, Tensor]:
    """Perplexity exp(-sum p log(p + 1e-7)) over all indices, and the fraction of the codebook in use (both scalars).

    Codes that do not occur add nothing, so only those that do are counted: no one-hot of codebook width.
    """
    _, counts = indices.flatten().unique(return_counts=True)
    p = counts.float() / indices.numel()
    return torch.exp(-(p * torch.log(p + 1e-7)).sum()), torch.tensor(len(counts) / codebook, device=indices.device)
