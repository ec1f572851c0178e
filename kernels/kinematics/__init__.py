"""Rotations, the heading scan and forward kinematics for batches of characters."""

from kinetok.kernels.kinematics.op import pose_from_features
from kinetok.kernels.kinematics.reference import (
    HEADING_CHANGE,
    ROOT_HEIGHT,
    ROOT_VELOCITY,
    forward_kinematics,
    heading_and_path,
    heading_scan,
    local_pose,
    matrix_from_6d,
    rotation_about_y,
    sixd_from_matrix,
)

__all__ = [
    "HEADING_CHANGE",
    "ROOT_HEIGHT",
    "ROOT_VELOCITY",
    "forward_kinematics",
    "heading_and_path",
    "heading_scan",
    "local_pose",
    "matrix_from_6d",
    "pose_from_features",
    "rotation_about_y",
    "sixd_from_matrix",
]
