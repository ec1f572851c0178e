"""Normalisation of features: one mean a channel, one deviation a block of channels (section 5)."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kinetok.motion.features import HEADING_CHANGE, POSITIONS, ROOT_VELOCITY, ROTATIONS, VELOCITIES
from kinetok.train.data.store import Clip

Means = tuple[NDArray[np.float64], NDArray[np.float64]]


def mean_std(clips: Iterable[Clip]) -> Means:
    """Mean ``[272]`` and standard deviation ``[272]`` over both sides of the clips.

    Clips with heading flips are left out: a roll turns the heading by half a circle within a frame, which would
    widen the root's deviations for everyone.
    """
    rows = np.concatenate([side for clip in clips if not clip.heading_flips for side in (clip.features, clip.mirrored)])
    return rows.mean(0, dtype=np.float64), _by_block(rows.std(0, dtype=np.float64))


def streamed_mean_std(clips: Iterable[NDArray[np.floating]]) -> Means:
    """Mean ``[272]`` and standard deviation ``[272]`` of features ``[T, 272]``, one clip in memory at a time."""
    count, total, squares = 0, np.zeros(272), np.zeros(272)
    for features in clips:
        rows = features.astype(np.float64)
        count, total, squares = count + len(rows), total + rows.sum(0), squares + np.square(rows).sum(0)
    mean = total / count
    return mean, _by_block(np.sqrt(np.maximum(squares / count - mean * mean, 0)))


def _by_block(deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    std = np.empty_like(deviation)
    for block in (ROOT_VELOCITY, HEADING_CHANGE, POSITIONS, VELOCITIES, ROTATIONS):
        std[block] = deviation[block].mean() or 1.0  # what never changes is not divided by nothing
    return std
