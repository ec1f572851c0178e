"""Normalisation."""

from kinetok.kernels.norm.reference import rms_norm

__all__ = ["rms_norm"]
