"""One-dimensional wavelet transforms."""

from kinetok.kernels.wavelet.reference import dwt, idwt

__all__ = ["dwt", "idwt"]
