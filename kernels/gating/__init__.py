"""Gated activations."""

from kinetok.kernels.gating.op import swiglu

__all__ = ["swiglu"]
