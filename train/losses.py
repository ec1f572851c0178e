"""Reconstruction losses of the tokenizer."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss, smooth_l1_loss

from kinetok.errors import UserError
from kinetok.kernels.kinematics import forward_kinematics, matrix_from_6d
from kinetok.kernels.wavelet import dwt
from kinetok.motion.features import HEADING_CHANGE, POSITIONS, ROOT_VELOCITY, ROTATIONS
from kinetok.motion.quality import FOOT_JOINTS
from kinetok.motion.skeleton import CANONICAL_OFFSETS, JOINTS, PARENTS

ROOT = slice(ROOT_VELOCITY.start, HEADING_CHANGE.stop)
FOOT_SCALE = 60.0  # a metre; a slide of 1.7 cm in a frame is where the loss turns from square to linear

DISTANCES = {"l1": l1_loss, "l2": mse_loss, "l1_smooth": smooth_l1_loss}
PARTS = {
    "motion": lambda x: x,
    "vel": lambda x: x[..., POSITIONS],  # called velocity in the reference, but channels 8:74 are positions
    "acc": lambda x: x[..., POSITIONS].diff(dim=-2),
    "acc_vel": lambda x: x[..., POSITIONS].diff(n=2, dim=-2),
    "root": lambda x: x[..., ROOT],
}
Part = Literal["motion", "vel", "acc", "acc_vel", "root"]


def reconstruction_loss(
    pred: Tensor, target: Tensor, part: Part = "motion", distance: Literal["l1", "l2", "l1_smooth"] = "l1_smooth"
) -> Tensor:
    """Mean distance of one part of normalised frames ``[B, T, 272]``, under the reference's names (section 4).

    motion: all channels; vel: the positions; acc, acc_vel: their first and second differences in time; root: channels
    0:8. l1_smooth turns from square to linear at 1. Raises ``UserError`` for other names.
    """
    if part not in PARTS or distance not in DISTANCES:
        raise UserError(f"expected part in {list(PARTS)} and distance in {list(DISTANCES)}, got {part!r}, {distance!r}")
    return DISTANCES[distance](PARTS[part](pred), PARTS[part](target))


def released_loss(pred: Tensor, target: Tensor) -> Tensor:
    """The loss of the released tokenizer on normalised frames ``[B, T, 272]`` (section 4): everything, positions again."""
    return reconstruction_loss(pred, target) + 0.5 * reconstruction_loss(pred, target, "vel")


def world_steps(joints: Tensor, frames: Tensor) -> Tensor:
    """The way of each joint in each frame, ``[B, T - 1, J, 3]`` metres, seen in the heading of the frame before.

    joints ``[B, T, J, 3]`` as in channels 8:74 (heading removed, x and z of the root subtracted), frames ``[B, T, 272]``
    not normalised (section 5).
    """
    turn = matrix_from_6d(frames[:, 1:, HEADING_CHANGE]).transpose(-1, -2)
    x, z = frames[:, 1:, ROOT_VELOCITY].unbind(-1)
    root = torch.stack((x, torch.zeros_like(x), z), dim=-1)
    return torch.einsum("btij,btkj->btki", turn, joints[:, 1:]) + root[:, :, None] - joints[:, :-1]


def mini_losses(pred: Tensor, target: Tensor, mean: Tensor, std: Tensor, *, bands: float = 0.0) -> dict[str, Tensor]:
    """The released loss and what a small data set needs beside it, on normalised frames ``[B, T, 272]``.

    root: the eight root channels again, and the error of the path they add up to, else a run of 4 m travels 0.7 m.
    motion: frame-to-frame differences of the positions. body: joints by forward kinematics of the rotations (heading
    left off), and their differences, because files are written from the rotations. feet: the steps of ankles and toes over
    the floor, which are small differences between the path and the legs; without it feet slide. bands: weight of the error
    in the upper half of the frequencies (one Haar level), where motion has little energy.
    """
    path = (pred - target)[..., ROOT_VELOCITY].cumsum(1)
    offsets = pred.new_tensor(CANONICAL_OFFSETS)
    metric = pred * std + mean
    local = matrix_from_6d(metric[..., ROTATIONS].unflatten(-1, (JOINTS, 6)))
    joints, _ = forward_kinematics(local, metric[..., POSITIONS][..., :3], offsets, PARENTS)
    built = (joints.flatten(-2) - mean[POSITIONS]) / std[POSITIONS]
    truth = target[..., POSITIONS]
    real = target * std + mean
    feet = [world_steps(j[..., FOOT_JOINTS, :], x) for j, x in ((joints, metric), (_joints(real), real))]
    losses = {
        "released": released_loss(pred, target),
        "root": 0.5 * smooth_l1_loss(pred[..., ROOT], target[..., ROOT])
        + 0.02 * smooth_l1_loss(0.3 * path, torch.zeros_like(path)),
        "motion": 0.5 * smooth_l1_loss(8 * pred[..., POSITIONS].diff(dim=1), 8 * truth.diff(dim=1)),
        "body": 0.5 * smooth_l1_loss(built, truth) + 0.5 * smooth_l1_loss(8 * built.diff(dim=1), 8 * truth.diff(dim=1)),
        "feet": 0.1 * smooth_l1_loss(FOOT_SCALE * feet[0], FOOT_SCALE * feet[1]),
    }
    if bands:
        high = dwt(pred - target, 1, scale="orthonormal", channels_last=True)[..., pred.shape[-1] :]
        losses["bands"] = bands * smooth_l1_loss(8 * high, torch.zeros_like(high))
    return {"loss": sum(losses.values(), start=pred.new_zeros(())), **losses}


def _joints(frames: Tensor) -> Tensor:
    return frames[..., POSITIONS].unflatten(-1, (JOINTS, 3))
