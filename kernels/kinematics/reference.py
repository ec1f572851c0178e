"""Eager kinematics on any device and in any floating dtype; matrices act on column vectors, Y is up."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

TINY = 1e-12

# A frame of a body with J joints is 8 + 12 J numbers (section 5): root velocity, heading change, joint positions and
# velocities without heading (3 J each), local rotations with the heading off the root (6 J).
ROOT_VELOCITY, HEADING_CHANGE, ROOT_HEIGHT, HEAD = slice(0, 2), slice(2, 8), 9, 8


def matrix_from_6d(x: Tensor) -> Tensor:
    """6D rotations ``[..., 6]`` (the first two rows, row-major) to rotation matrices ``[..., 3, 3]`` (section 5).

    Gram-Schmidt: the result is a rotation for every input; a zero or parallel pair of rows gives a finite, arbitrary one.
    """
    first = normalize(x[..., :3], dim=-1, eps=TINY)
    second = x[..., 3:]
    second = normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1, eps=TINY)
    return torch.stack((first, second, torch.linalg.cross(first, second)), dim=-2)


def sixd_from_matrix(rotation: Tensor) -> Tensor:
    """Rotation matrices ``[..., 3, 3]`` to their first two rows ``[..., 6]``."""
    return rotation[..., :2, :].flatten(-2)


def rotation_about_y(angle: Tensor) -> Tensor:
    """Angles ``[...]`` in radians to rotations about +Y ``[..., 3, 3]``."""
    cos, sin = angle.cos(), angle.sin()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack((cos, zero, sin, zero, one, zero, -sin, zero, cos), dim=-1).unflatten(-1, (3, 3))


def _quaternion(rotation: Tensor) -> Tensor:
    """Rotation matrices ``[..., 3, 3]`` to unit quaternions ``[..., 4]`` (w, x, y, z), of either sign."""
    m00, m11, m22 = rotation[..., 0, 0], rotation[..., 1, 1], rotation[..., 2, 2]
    wx = rotation[..., 2, 1] - rotation[..., 1, 2]
    wy = rotation[..., 0, 2] - rotation[..., 2, 0]
    wz = rotation[..., 1, 0] - rotation[..., 0, 1]
    xy = rotation[..., 0, 1] + rotation[..., 1, 0]
    xz = rotation[..., 0, 2] + rotation[..., 2, 0]
    yz = rotation[..., 1, 2] + rotation[..., 2, 1]
    # The four rows of 4 q q^T: each is a multiple of q, and the one with the largest diagonal is the accurate one.
    outer = torch.stack(
        (
            torch.stack((1 + m00 + m11 + m22, wx, wy, wz), -1),
            torch.stack((wx, 1 + m00 - m11 - m22, xy, xz), -1),
            torch.stack((wy, xy, 1 - m00 + m11 - m22, yz), -1),
            torch.stack((wz, xz, yz, 1 - m00 - m11 + m22), -1),
        ),
        -2,
    )
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = outer.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    return normalize(row, dim=-1, eps=TINY)


def _quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    aw, av, bw, bv = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    real = aw * bw - (av * bv).sum(-1, keepdim=True)
    return torch.cat((real, aw * bv + bw * av + torch.linalg.cross(av, bv)), dim=-1)


def _matrix_from_quaternion(q: Tensor) -> Tensor:
    w, x, y, z = q.unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    )
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def heading_scan(change: Tensor) -> Tensor:
    """Running products ``H_t = D_t H_{t-1}``, ``H_0 = D_0`` of rotations ``[..., T, 3, 3]`` (section 5).

    A scan in log2(T) steps over quaternions that are normalised at each step: the result is a rotation however long
    the clip, while a chain of matrix products drifts away from one.
    """
    steps = change.shape[-3]
    q = _quaternion(change)
    reach = 1
    while reach < steps:
        first = q[..., :reach, :]
        identity = torch.cat((torch.ones_like(first[..., :1]), torch.zeros_like(first[..., 1:])), dim=-1)
        earlier = torch.cat((identity, q[..., : steps - reach, :]), dim=-2)
        q = normalize(_quaternion_product(q, earlier), dim=-1)
        reach *= 2
    return _matrix_from_quaternion(q)


def forward_kinematics(
    rotations: Tensor, root: Tensor, offsets: Tensor, parents: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Joint positions and global rotations of a kinematic tree.

    rotations ``[..., J, 3, 3]`` local (joint 0 global), root ``[..., 3]`` position of joint 0, offsets ``[J, 3]`` of each
    joint from its parent in the rest pose (row 0 unused), parents of each joint (an earlier one; -1 for joint 0).
    Returns positions ``[..., J, 3]`` and global rotations ``[..., J, 3, 3]``.
    """
    positions, globals_ = [root], [rotations[..., 0, :, :]]
    for joint in range(1, len(parents)):
        parent = parents[joint]
        positions.append(positions[parent] + globals_[parent] @ offsets[joint])
        globals_.append(globals_[parent] @ rotations[..., joint, :, :])
    return torch.stack(positions, dim=-2), torch.stack(globals_, dim=-3)


def heading_and_path(features: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse heading ``[..., T, 3, 3]`` and the root's path on the floor ``[..., T, 3]`` (y = 0) of features.

    features ``[..., T, 8 + 12 J]``: heading changes are multiplied up, steps turned out of the frame before's heading and
    added up.
    """
    back = heading_scan(matrix_from_6d(features[..., HEADING_CHANGE])).transpose(-1, -2)
    x, z = features[..., ROOT_VELOCITY].unbind(-1)
    step = torch.stack((x, torch.zeros_like(x), z), dim=-1)
    step = torch.cat((step[..., :1, :], (back[..., :-1, :, :] @ step[..., 1:, :, None])[..., 0]), dim=-2)
    path = step.cumsum(-2)
    # The floor path ignores the vertical part that a tilted heading gives to a step.
    return back, torch.stack((path[..., 0], torch.zeros_like(path[..., 1]), path[..., 2]), dim=-1)


def local_pose(features: Tensor) -> tuple[Tensor, Tensor]:
    """Local rotations ``[..., T, J, 3, 3]`` (joint 0 global) and root positions ``[..., T, 3]`` of features."""
    back, path = heading_and_path(features)
    joints = (features.shape[-1] - HEAD) // 12
    local = matrix_from_6d(features[..., HEAD + 6 * joints :].unflatten(-1, (joints, 6)))
    rotations = torch.cat((back[..., None, :, :] @ local[..., :1, :, :], local[..., 1:, :, :]), dim=-3)
    return rotations, torch.stack((path[..., 0], features[..., ROOT_HEIGHT], path[..., 2]), dim=-1)


def pose_from_features(features: Tensor, offsets: Tensor, parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Joints ``[..., T, J, 3]`` and global rotations ``[..., T, J, 3, 3]`` of features ``[..., T, 8 + 12 J]``.

    offsets ``[J, 3]`` of each joint from its parent; parents as in ``forward_kinematics``.
    """
    return forward_kinematics(*local_pose(features), offsets, parents)
