"""The launchers of the attention operators and the configurations in which they compile ahead of time."""

from kinetok.kernels.attention import decode_kernels, prefix_kernels
from kinetok.kernels.attention.decode_kernels import decode_attention
from kinetok.kernels.attention.prefix_kernels import prefix_attention, prefix_attention_backward

__all__ = ["AOT", "decode_attention", "prefix_attention", "prefix_attention_backward"]

AOT = [*prefix_kernels.AOT, *decode_kernels.AOT]
