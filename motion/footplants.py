"""Where a foot is planted: stretches of time in which one of its joints rests on the floor."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]

REST_SPEED = 0.15  # metres a second: a planted joint is slower than this at least once,
HOLD_SPEED = 0.35  # and never faster than this
RADIUS = 0.03  # metres: it stays this close to the place it is planted on
STILL_SPEED = 0.004  # metres a second: a joint this slow stands as it should, if need be by an earlier clean-up
SLACK = 0.005  # metres: a joint that stays this close to its place stands well enough,
CREEP = 0.05  # metres a second: and so does one that never shifts faster than people do who stand and wait
# A body in free fall is slower than quality.CONTACT_SPEED for 0.10 s at the top of a hop, so a shorter rest proves nothing.
SHORTEST = 0.10  # seconds
APART = 0.3  # seconds between two plants that one slow slide joins
SOFT_SPEED = 0.1  # metres a second: softens the weight of slow frames in a plant's place


@dataclass(frozen=True, slots=True)
class Plant:
    """Frames ``start`` to ``end`` (not included) in which a joint is planted at ``place [3]``, None for where it is."""

    start: int
    end: int
    place: Doubles | None


def intervals(mask: Bools) -> list[tuple[int, int]]:
    """The runs of true in a mask ``[T]`` as (first, one past the last)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def speeds(path: Doubles, fps: float) -> Doubles:
    """Speed ``[T]`` in metres a second of a point on ``path [T, 3]``: central differences, one-sided at the ends."""
    return np.linalg.norm(np.gradient(path, axis=0), axis=-1) * fps if len(path) > 1 else np.zeros(len(path))


def find_plants(path: Doubles, contact: Bools, fps: float) -> list[Plant]:
    """The plants of a joint on ``path [T, 3]`` among its frames of ``contact [T]`` (``quality.contacts``), in order.

    A plant is longer than a hop's turning point, comes to rest once, never moves fast and does not leave a small circle.
    What never comes to rest is no plant, however low; a slow slide that leaves the circle becomes several. The place is
    the mean of the path, in which slow frames weigh most.
    """
    speed = speeds(path, fps)
    weight = 1.0 / (speed + SOFT_SPEED) ** 2
    shortest = int(SHORTEST * fps) + 2
    still = [(a, b) for a, b in intervals(contact & (speed < STILL_SPEED)) if b - a >= shortest]
    found: list[Plant] = []
    waiting = []
    for start, end in intervals(contact & (speed < HOLD_SPEED)):
        inside = [Plant(a, b, None) for a, b in still if start <= a and b <= end]
        found += inside
        if not inside:
            waiting.append((start, end))
    while waiting:
        start, end = waiting.pop()
        first, last = start, end
        while last - first >= shortest:
            place = np.average(path[first:last], axis=0, weights=weight[first:last])
            away = np.linalg.norm(path[first:last] - place, axis=-1)
            if away.max() <= RADIUS:
                break
            if away[0] >= away[-1]:
                first += 1
            else:
                last -= 1
        if last - first < shortest or speed[first:last].min() > REST_SPEED:
            continue
        well = away.max() <= SLACK or speed[first:last].max() <= CREEP
        found.append(Plant(first, last, None if well else place))
        gap = round(APART * fps)
        waiting += [(a, b) for a, b in ((start, first - gap), (last + gap, end)) if b - a >= shortest]
    return sorted(found, key=lambda plant: plant.start)
