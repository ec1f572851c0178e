"""Cross-entropy of a linear head over many classes."""

from kinetok.kernels.cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
