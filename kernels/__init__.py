"""Operators: one folder per family, each with an eager reference; needs torch only."""

if __name__ != "kinetok.kernels":
    raise ImportError("import kinetok.kernels, not the bare folder kernels: an operator would be registered twice")

from kinetok.kernels.fsq import fsq_dequantize, fsq_quantize
from kinetok.kernels.wavelet import dwt, idwt

__all__ = ["dwt", "fsq_dequantize", "fsq_quantize", "idwt"]
