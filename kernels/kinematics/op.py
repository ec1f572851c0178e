"""Registration of the kinematics and their checked public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.kinematics import reference
from kinetok.kernels.ops import check_device, kernel_op, takes_op

_pose_from_features = kernel_op(reference.pose_from_features)


@_pose_from_features.register_fake
def _(features: Tensor, offsets: Tensor, parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = (*features.shape[:-1], len(parents), 3)
    return features.new_empty(shape), features.new_empty((*shape, 3))


def pose_from_features(features: Tensor, offsets: Tensor, parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Joints ``[..., T, J, 3]`` and global rotations ``[..., T, J, 3, 3]`` of ``features [..., T, 8 + 12 J]`` (section 5).

    Each clip ``[T, 8 + 12 J]`` on its own: 6D to matrices, headings multiplied up over time and the root's path added up,
    then forward kinematics; metres in, metres out. offsets ``[J, 3]`` of each joint from its parent, parents an earlier
    joint each, -1 for joint 0. In fp32 or fp64, in which everything is computed. Inputs that need a gradient take the
    definition, on every device. Raises ``UserError`` for shapes and dtypes that do not fit.
    """
    joints = len(parents)
    if features.ndim < 2 or features.shape[-1] != reference.HEAD + 12 * joints or offsets.shape != (joints, 3):
        raise UserError(
            f"expected features [..., T, {reference.HEAD + 12 * joints}] and offsets [{joints}, 3] for {joints} joints, "
            f"got {list(features.shape)} and {list(offsets.shape)}"
        )
    if features.dtype not in (torch.float32, torch.float64) or offsets.dtype != features.dtype:
        raise UserError(f"expected features and offsets both in fp32 or fp64, got {features.dtype} and {offsets.dtype}")
    if list(parents[:1]) != [-1] or any(not 0 <= parent < joint for joint, parent in enumerate(parents[1:], start=1)):
        raise UserError(f"expected -1 and then an earlier joint each as parents, got {list(parents)}")
    check_device(features, offsets)
    learns = torch.is_grad_enabled() and (features.requires_grad or offsets.requires_grad)
    route = _pose_from_features if takes_op(features) and not learns else reference.pose_from_features
    return route(features, offsets, list(parents))
