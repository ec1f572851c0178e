"""Finite scalar quantisation."""

from kinetok.kernels.fsq.reference import (
    codes_to_indices,
    fsq_bound,
    fsq_dequantize,
    fsq_perplexity,
    fsq_quantize,
)

__all__ = ["codes_to_indices", "fsq_bound", "fsq_dequantize", "fsq_perplexity", "fsq_quantize"]
