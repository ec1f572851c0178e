"""Blocks of frames that go on from one another, against the whole clip's kinematics."""

import numpy as np
import torch

from kinetok.kernels.kinematics import local_pose
from kinetok.runtime.standing import Standing


def test_blocks_of_any_length_are_the_whole_clip() -> None:
    """Random numbers: headings that tilt, too."""
    x = np.random.default_rng(3).standard_normal((700, 272)).astype(np.float32)
    wanted = [part.numpy() for part in local_pose(torch.from_numpy(x.astype(np.float64)))]
    at, parts = Standing(), []
    for block in np.split(x, [1, 3, 4, 24, 25, 600]):
        rotations, root, at = at.walk(block)
        parts.append((rotations, root))
    for got, whole in zip(zip(*parts, strict=True), wanted, strict=True):
        np.testing.assert_allclose(np.concatenate(got), whole, atol=1e-9)
