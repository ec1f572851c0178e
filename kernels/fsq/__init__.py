"""Finite scalar quantisation."""

from kinetok.kernels.fsq.op import fsq_decode, fsq_dequantize, fsq_encode, fsq_quantize
from kinetok.kernels.fsq.reference import codes_to_indices, fsq_bound, fsq_perplexity

__all__ = [
    "codes_to_indices",
    "fsq_bound",
    "fsq_decode",
    "fsq_dequantize",
    "fsq_encode",
    "fsq_perplexity",
    "fsq_quantize",
]
