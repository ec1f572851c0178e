"""Frames to 272 numbers and back (MotionMillion, section 5).

Every function takes and returns numpy arrays or torch tensors, whichever it is given, and computes in float64.
Layout of a frame: root velocity x, z (0:2), heading change as 6D (2:8), joint positions without heading (8:74), joint
velocities (74:140), local rotations as 6D with the heading taken off the root (140:272).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.kinematics import (
    HEADING_CHANGE,
    ROOT_VELOCITY,
    forward_kinematics,
    heading_and_path,
    local_pose,
    pose_from_features,
    rotation_about_y,
    sixd_from_matrix,
)
from kinetok.motion.skeleton import JOINTS, LEFT_RIGHT, PARENTS

FEATURES = 272
POSITIONS = slice(8, 74)
VELOCITIES = slice(74, 140)
ROTATIONS = slice(140, 272)


Array = Any  # numpy.ndarray or torch.Tensor
Function = TypeVar("Function", bound=Callable[..., Any])


def _same_kind(function: Function) -> Function:
    """Hand the arrays to ``function`` as float64 tensors; give its results the kind and dtype of the first one."""

    @wraps(function)
    def wrapper(*arrays: Array) -> Any:
        first = arrays[0]
        if isinstance(first, Tensor):
            dtype = first.dtype if first.is_floating_point() else torch.float64
            device = first.device
        else:
            first = np.asarray(first)
            dtype = torch.from_numpy(np.empty(0, first.dtype)).dtype if first.dtype.kind == "f" else torch.float64
            device = torch.device("cpu")
        as_numpy = not isinstance(arrays[0], Tensor)

        def restore(value: Tensor) -> Array:
            value = value.to(dtype)
            return value.numpy() if as_numpy else value

        result = function(*(torch.as_tensor(a).to(device=device, dtype=torch.float64) for a in arrays))
        return tuple(map(restore, result)) if isinstance(result, tuple) else restore(result)

    return cast(Function, wrapper)


def _expect(name: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    if value.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("T" if size is None else str(size) for size in shape)
        raise UserError(f"{name}: expected the shape [{wanted}], got {list(value.shape)}")
    if value.shape[0] == 0:
        raise UserError(f"{name}: expected at least one frame, got none")
    if not value.isfinite().all():
        raise UserError(f"{name}: expected finite numbers, got NaN or infinity")


def _expect_features(x: Tensor) -> None:
    _expect("features", x.flatten(0, -2) if x.ndim > 2 else x, (None, FEATURES))


@_same_kind
def from_motion(rotations: Array, root: Array, offsets: Array) -> Array:
    """The 272 features of a motion.

    rotations ``[T, 22, 3, 3]`` local (joint 0 global), root ``[T, 3]`` position of the pelvis in metres, offsets
    ``[22, 3]`` of the joints from their parents. The clip is first turned about Y so that it starts facing +Z, and put
    on the floor (its lowest joint at y = 0). Returns ``[T, 272]``.
    """
    _expect("rotations", rotations, (None, JOINTS, 3, 3))
    _expect("root", root, (rotations.shape[0], 3))
    _expect("offsets", offsets, (JOINTS, 3))
    forward = rotations[:1, 0]
    turn = rotation_about_y(-torch.atan2(forward[:, 0, 2], forward[:, 2, 2]))  # [1, 3, 3]
    rotations = torch.cat((turn[:, None] @ rotations[:, :1], rotations[:, 1:]), dim=1)
    root = (turn @ root[..., None])[..., 0]
    joints, _ = forward_kinematics(rotations, root, offsets, PARENTS)
    joints = joints - joints.new_tensor([0, 1, 0]) * joints[..., 1].min()
    root = joints[:, 0]

    theta = -torch.atan2(rotations[:, 0, 0, 2], rotations[:, 0, 2, 2])
    heading = rotation_about_y(theta)  # [T, 3, 3]
    step = (heading[:-1] @ (root[1:] - root[:-1])[..., None])[:, [0, 2], 0]
    change = rotation_about_y(torch.cat((theta.new_zeros(1), theta[1:] - theta[:-1])))
    local = (heading[:, None] @ (joints - root[:, None] * root.new_tensor([1, 0, 1]))[..., None])[..., 0]
    unheaded = torch.cat((heading[:, None] @ rotations[:, :1], rotations[:, 1:]), dim=1)
    return torch.cat(
        (
            torch.cat((step.new_zeros(1, 2), step)),
            sixd_from_matrix(change),
            local.flatten(1),
            torch.cat((local.new_zeros(1, 3 * JOINTS), (local[1:] - local[:-1]).flatten(1))),
            sixd_from_matrix(unheaded).flatten(1),
        ),
        dim=1,
    )


@_same_kind
def mirrored(x: Array) -> Array:
    """The features ``[T, 272]`` of the motion mirrored left to right, for a skeleton that is its own mirror image."""
    _expect("features", x, (None, FEATURES))
    swapped = list(range(JOINTS))
    for left, right in LEFT_RIGHT:
        swapped[left], swapped[right] = right, left
    x_axis = x.new_tensor([-1, 1, 1])
    rows = x.new_tensor([1, -1, -1, -1, 1, 1])  # of a matrix between two mirrors, its first two rows

    def points(channels: slice) -> Tensor:
        return (x[:, channels].unflatten(1, (JOINTS, 3))[:, swapped] * x_axis).flatten(1)

    rotations = x[:, ROTATIONS].unflatten(1, (JOINTS, 6))[:, swapped] * rows
    return torch.cat(
        (
            x[:, ROOT_VELOCITY] * x_axis[[0, 2]],
            x[:, HEADING_CHANGE] * rows,
            points(POSITIONS),
            points(VELOCITIES),
            rotations.flatten(1),
        ),
        dim=1,
    )


@_same_kind
def joints_from_positions(x: Array) -> Array:
    """Joints ``[..., T, 22, 3]`` in metres from the local positions of features ``[..., T, 272]``."""
    _expect_features(x)
    back, path = heading_and_path(x)
    local = x[..., POSITIONS].unflatten(-1, (JOINTS, 3))
    return (back[..., None, :, :] @ local[..., None])[..., 0] + path[..., None, :]


@_same_kind
def rotations_from_features(x: Array) -> tuple[Array, Array]:
    """Local rotations ``[..., T, 22, 3, 3]`` (joint 0 global) and pelvis positions ``[..., T, 3]`` of features.

    features ``[..., T, 272]``.
    """
    _expect_features(x)
    return local_pose(x)


@_same_kind
def joints_from_rotations(x: Array, offsets: Array) -> Array:
    """Joints ``[..., T, 22, 3]`` in metres by forward kinematics over the rotations of features ``[..., T, 272]``."""
    _expect_features(x)
    _expect("offsets", offsets, (JOINTS, 3))
    return pose_from_features(x, offsets, PARENTS)[0]
