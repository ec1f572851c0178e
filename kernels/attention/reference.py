"""Eager attention (section 3)."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def prefix_mask(text_lengths: Tensor, positions: int) -> Tensor:
    """Visibility ``[B, 1, T, T]``: key j is seen by query i if j <= i, or if both are among the row's text positions."""
    at = torch.arange(positions, device=text_lengths.device)
    text = at < text_lengths[:, None]  # [B, T]
    return ((at[None, :] <= at[:, None]) | (text[:, :, None] & text[:, None, :]))[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax attention of ``q [B, H, T, hd]`` over ``k, v [B, H, S, hd]``, scaled by 1 / sqrt(hd).

    visible ``[B, 1, T, S]`` bool says which keys a query sees; None means all of them.
    """
    return scaled_dot_product_attention(q, k, v, attn_mask=visible)
