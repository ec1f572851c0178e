"""Sampling that gives the same token for the same seed whatever the batch, the device or the host language."""

from kinetok.kernels.sampling.arithmetic import exp2_weight, log_fp32
from kinetok.kernels.sampling.philox import philox
from kinetok.kernels.sampling.reference import draw, guide, gumbel, sample

__all__ = ["draw", "exp2_weight", "guide", "gumbel", "log_fp32", "philox", "sample"]
