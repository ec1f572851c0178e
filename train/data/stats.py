"""Normalisation of features: one mean a channel, one deviation a block of channels (section 5)."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kinetok.motion.features import HEADING_CHANGE, POSITIONS, ROOT_VELOCITY, ROTATIONS, VELOCITIES
from kinetok.train.data.store import Clip


def mean_std(clips: Iterable[Clip]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean ``[272]`` and standard deviation ``[272]`` over both sides of the clips.

    Clips with heading flips are left out: a roll turns the heading by half a circle within a frame, which would
    widen the root's deviations for everyone.
    """
    rows = np.concatenate([side for clip in clips if not clip.heading_flips for side in (clip.features, clip.mirrored)])
    mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    std = np.empty_like(deviation)
    for block in (ROOT_VELOCITY, HEADING_CHANGE, POSITIONS, VELOCITIES, ROTATIONS):
        std[block] = deviation[block].mean()
    return mean, std
