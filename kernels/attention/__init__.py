"""Attention over a text prefix and causal motion."""

from kinetok.kernels.attention.backends import attention_backends
from kinetok.kernels.attention.op import decode_attention, prefix_attention
from kinetok.kernels.attention.reference import attention, prefix_mask

__all__ = ["attention", "attention_backends", "decode_attention", "prefix_attention", "prefix_mask"]
