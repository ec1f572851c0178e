"""``Standing``: what a block of frames goes on from, so that blocks lie in one world."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from kinetok.kernels.kinematics import HEADING_CHANGE, ROOT_HEIGHT, ROOT_VELOCITY, matrix_from_6d
from kinetok.motion.features import ROTATIONS

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """Where a figure stands, and its heading; by default a clip's own start, the origin facing +Z.

    heading ``[3, 3]``: the product of all heading changes so far. place ``[3]``, of which the height says nothing.
    """

    heading: Doubles = field(default_factory=lambda: np.eye(3))
    place: Doubles = field(default_factory=lambda: np.zeros(3))

    def walk(self, features: NDArray[np.float32]) -> tuple[Doubles, Doubles, "Standing"]:
        """Local rotations ``[T, 22, 3, 3]`` (joint 0 global) and root ``[T, 3]`` of features ``[T, 272]`` that go on from
        here, and where they end: ``kernels.kinematics.local_pose`` of the whole, cut into blocks.

        Frame by frame, since a reader asks for two at a time, and a scan's many small operations cost more than these few.
        """
        x = features.astype(np.float64)
        rows = np.concatenate((x[:, HEADING_CHANGE], x[:, ROTATIONS]), 1).reshape(len(x), -1, 6)
        matrices = matrix_from_6d(torch.from_numpy(rows)).numpy()
        changes, rotations = matrices[:, 0], matrices[:, 1:]
        steps = np.insert(x[:, ROOT_VELOCITY], 1, 0, 1)
        heading, place, places = self.heading, self.place, []
        for step, change, rotation in zip(steps, changes, rotations, strict=True):
            place = place + heading.T @ step
            heading = change @ heading
            rotation[0] = heading.T @ rotation[0]
            places.append(place)
        root = np.stack(places)
        root[:, 1] = x[:, ROOT_HEIGHT]
        return rotations, root, Standing(heading, place)
