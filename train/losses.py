"""Reconstruction losses of the tokenizer."""

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kinetok.kernels.kinematics import forward_kinematics, matrix_from_6d
from kinetok.motion.features import HEADING_CHANGE, POSITIONS, ROOT_VELOCITY, ROTATIONS
from kinetok.motion.skeleton import CANONICAL_OFFSETS, JOINTS, PARENTS


def released_loss(pred: Tensor, target: Tensor) -> Tensor:
    """The loss of the released tokenizer on normalised frames ``[B, T, 272]`` (section 4): everything, positions again."""
    return smooth_l1_loss(pred, target) + 0.5 * smooth_l1_loss(pred[..., POSITIONS], target[..., POSITIONS])


def mini_losses(pred: Tensor, target: Tensor, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The released loss and what a small data set needs beside it, on normalised frames ``[B, T, 272]``.

    root: the eight root channels again, and the error of the path they add up to, else a run of 4 m travels 0.7 m.
    motion: frame-to-frame differences of the positions. body: joints by forward kinematics of the rotations (heading
    left off), and their differences, because files are written from the rotations.
    """
    root = slice(ROOT_VELOCITY.start, HEADING_CHANGE.stop)
    path = (pred - target)[..., ROOT_VELOCITY].cumsum(1)
    offsets = pred.new_tensor(CANONICAL_OFFSETS)
    body = pred[..., ROTATIONS] * std[ROTATIONS] + mean[ROTATIONS]
    local = matrix_from_6d(body.unflatten(-1, (JOINTS, 6)))
    origin = pred[..., POSITIONS][..., :3] * std[POSITIONS][:3] + mean[POSITIONS][:3]
    joints = forward_kinematics(local, origin, offsets, PARENTS)[0].flatten(-2)
    built = (joints - mean[POSITIONS]) / std[POSITIONS]
    truth = target[..., POSITIONS]
    losses = {
        "released": released_loss(pred, target),
        "root": 0.5 * smooth_l1_loss(pred[..., root], target[..., root])
        + 0.02 * smooth_l1_loss(0.3 * path, torch.zeros_like(path)),
        "motion": 0.5 * smooth_l1_loss(8 * pred[..., POSITIONS].diff(dim=1), 8 * truth.diff(dim=1)),
        "body": 0.5 * smooth_l1_loss(built, truth) + 0.5 * smooth_l1_loss(8 * built.diff(dim=1), 8 * truth.diff(dim=1)),
    }
    return {"loss": sum(losses.values(), start=pred.new_zeros(())), **losses}
