"""Rotary position code."""

from kinetok.kernels.rotary.reference import apply_rotary, rotary_table

__all__ = ["apply_rotary", "rotary_table"]
