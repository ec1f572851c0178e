"""Skinny matrix products of the decode step, on weights packed once."""

from kinetok.kernels.linear.op import linear
from kinetok.kernels.linear.packing import PackedWeight, pack, split_k, unpack

__all__ = ["PackedWeight", "linear", "pack", "split_k", "unpack"]
