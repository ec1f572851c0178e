"""Sampling in Triton, bit for bit by docs/numerics.md: fp32 operations rounded one by one, integers for every cut."""

from kinetok.kernels.sampling import draw_kernel, greedy_kernels
from kinetok.kernels.sampling.draw_kernel import sample_step
from kinetok.kernels.sampling.greedy_kernels import greedy_step

__all__ = ["AOT", "greedy_step", "sample_step"]

AOT = [*draw_kernel.AOT, *greedy_kernels.AOT]
