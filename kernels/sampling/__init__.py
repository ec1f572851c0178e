"""Sampling that gives the same token for the same seed whatever the batch, the device or the host language."""

from kinetok.kernels.sampling.arithmetic import exp2_weight, log_fp32
from kinetok.kernels.sampling.op import greedy_step, sample_step
from kinetok.kernels.sampling.philox import philox
from kinetok.kernels.sampling.reference import draw, guide, gumbel, sample
from kinetok.kernels.sampling.state import Draw, SamplingState

__all__ = [
    "Draw",
    "SamplingState",
    "draw",
    "exp2_weight",
    "greedy_step",
    "guide",
    "gumbel",
    "log_fp32",
    "philox",
    "sample",
    "sample_step",
]
