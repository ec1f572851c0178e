"""What training makes out of a clip beside its mirror image: longer clips, livelier crops, and what can be said of a crop."""

import re

import numpy as np
from numpy.typing import NDArray

from kinetok.motion.features import HEADING_CHANGE, POSITIONS, ROTATIONS, VELOCITIES
from kinetok.motion.skeleton import FPS, JOINTS

SEAM_FRAMES = 6
SHORTEST_CYCLE = 15
LOCOMOTION = re.compile(r"\b(walk|run|jog|sneak|move|stroll|sprint)", re.IGNORECASE)
TURN = np.radians(50)
TURN_WORDS = (
    "a person turns {side}",
    "someone turns to the {side}",
    "a person makes a turn to the {side}",
    "{caption} and turns {side}",
    "{caption}, turning to the {side}",
)


def heading(features: NDArray) -> NDArray[np.float64]:
    """The direction that the body faces at each frame ``[T]`` of features ``[T, 272]``: radians, left positive."""
    change = features[:, HEADING_CHANGE].astype(np.float64)
    return -np.cumsum(np.arctan2(change[:, 2], change[:, 0]))


def liveliness(features: NDArray) -> NDArray[np.float64]:
    """Mean speed of the joints relative to the root in each frame ``[T]``, metres a second."""
    return np.linalg.norm(features[:, VELOCITIES].reshape(-1, JOINTS, 3), axis=-1).mean(-1) * FPS


def turn_caption(caption: str, turned: float, rng: np.random.Generator) -> str | None:
    """A caption that names the turn of a crop that ``turned`` so many radians (left positive).

    None where the crop goes straight, or where the caption is not of somebody going somewhere: a dancer's pirouette is not
    what "a person turns left" asks for.
    """
    if abs(turned) < TURN or not LOCOMOTION.search(caption) or re.search(r"\b(left|right)\b", caption):
        return None
    words = TURN_WORDS[rng.integers(len(TURN_WORDS))]
    return words.format(caption=caption, side="left" if turned > 0 else "right")


def lengthen(features: NDArray[np.float32], frames: int, *, farthest: float = 0.1) -> NDArray[np.float32] | None:
    """A clip repeated from its best-fitting pair of frames until it has at least ``frames`` of them, or None.

    The seam joins the late frame and the early one whose poses and velocities are nearest (mean over the joints of metres
    plus a tenth of metres a second); None when they are farther apart than ``farthest``. The gap is spread over
    ``SEAM_FRAMES``, so poses go on without a jump. Runs of a second become runs that last.
    """
    count = len(features)
    if count >= frames or count < 2 * SHORTEST_CYCLE:
        return None
    pose = features[:, POSITIONS].reshape(count, JOINTS, 3)
    speed = features[:, VELOCITIES].reshape(count, JOINTS, 3) * (0.1 * FPS)
    late, early = np.arange(count // 2, count), np.arange(1, count // 2)
    gap = sum(np.linalg.norm(x[late][:, None] - x[early][None], axis=-1).mean(-1) for x in (pose, speed))
    gap = np.where(late[:, None] - early[None] >= SHORTEST_CYCLE, gap, np.inf)
    row, column = np.unravel_index(np.argmin(gap), gap.shape)
    if not gap[row, column] <= farthest:
        return None
    end, start = int(late[row]), int(early[column])
    fade = 1 - np.arange(1, SEAM_FRAMES + 1, dtype=np.float32)[:, None] / (SEAM_FRAMES + 1)
    pieces = [features[: end + 1]]
    held = [*range(POSITIONS.start, POSITIONS.stop), *range(ROTATIONS.start, ROTATIONS.stop)]
    length = end + 1
    while length < frames:
        again = features[start + 1 : end + 1].copy()
        steps = min(SEAM_FRAMES, len(again))
        again[:steps, held] += fade[:steps] * (features[end, held] - features[start, held])
        pieces.append(again)
        length += len(again)
    pieces.append(features[end + 1 :])
    result = np.concatenate(pieces)
    result[1:, VELOCITIES] = result[1:, POSITIONS] - result[:-1, POSITIONS]
    return result
