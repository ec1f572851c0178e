"""Rotations, the heading scan and forward kinematics for batches of characters."""

from kinetok.kernels.kinematics.reference import (
    forward_kinematics,
    heading_scan,
    matrix_from_6d,
    rotation_about_y,
    sixd_from_matrix,
)

__all__ = ["forward_kinematics", "heading_scan", "matrix_from_6d", "rotation_about_y", "sixd_from_matrix"]
