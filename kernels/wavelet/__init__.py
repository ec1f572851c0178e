"""One-dimensional wavelet transforms."""

from kinetok.kernels.wavelet.op import Mode, Scale, Tree, Wavelet, dwt, idwt

__all__ = ["Mode", "Scale", "Tree", "Wavelet", "dwt", "idwt"]
