"""Rotary position code."""

from kinetok.kernels.rotary.op import apply_rotary, rotary_kv_write
from kinetok.kernels.rotary.reference import rotary_table

__all__ = ["apply_rotary", "rotary_kv_write", "rotary_table"]
