"""Attention over a text prefix and causal motion."""

from kinetok.kernels.attention.reference import attention, prefix_mask

__all__ = ["attention", "prefix_mask"]
