"""What a figure does, in numbers from its joints alone: travel, turning, flight, strikes, waving.

Joints are ``[T, 22, 3]`` in metres with Y up, at ``FPS`` frames a second, on a body of the canonical size. Nothing here
depends on where the figure stands on the floor or which way it faces. A clip of one frame has no speed. Every function
raises ``UserError`` for joints of another shape, of no frames, or with NaN.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kinetok.errors import UserError
from kinetok.motion.skeleton import FPS, JOINT_NAMES, JOINTS

Doubles = NDArray[np.float64]

PELVIS, HEAD = JOINT_NAMES.index("pelvis"), JOINT_NAMES.index("head")


def _pair(joint: str) -> list[int]:
    """The left and the right one."""
    return [JOINT_NAMES.index(f"{side}_{joint}") for side in ("left", "right")]


HIPS, KNEES, ANKLES, TOES = (_pair(joint) for joint in ("hip", "knee", "ankle", "foot"))
SHOULDERS, ELBOWS, WRISTS = (_pair(joint) for joint in ("shoulder", "elbow", "wrist"))
FLOOR = [0, 2]  # the axes of the floor
SMOOTH = 5  # frames; a moving mean that takes the jitter out of the root's path


def figure(joints: ArrayLike) -> Doubles:
    """The joints as float64 ``[T, 22, 3]``; ``UserError`` for what is not a motion."""
    try:
        x = np.asarray(joints, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"joints: expected an array of numbers, got {type(joints).__name__}") from error
    if x.ndim != 3 or x.shape[1:] != (JOINTS, 3):
        raise UserError(f"joints: expected the shape [T, {JOINTS}, 3], got {list(x.shape)}")
    if not len(x):
        raise UserError("joints: expected at least one frame, got none")
    if not np.isfinite(x).all():
        raise UserError("joints: expected finite numbers, got NaN or infinity")
    return x


def _smooth(x: Doubles) -> Doubles:
    """Moving mean over ``SMOOTH`` frames along the first axis, the ends held."""
    half = SMOOTH // 2
    padded = np.concatenate((np.repeat(x[:1], half, 0), x, np.repeat(x[-1:], half, 0)))
    return np.mean([padded[i : i + len(x)] for i in range(SMOOTH)], axis=0)


def facing(joints: ArrayLike) -> Doubles:
    """Unit vectors ``[T, 2]`` (x, z) that the hips and shoulders face."""
    x = figure(joints)
    across = x[:, HIPS[0]] - x[:, HIPS[1]] + x[:, SHOULDERS[0]] - x[:, SHOULDERS[1]]
    ahead = np.stack((-across[:, 2], across[:, 0]), -1)
    return ahead / np.maximum(np.linalg.norm(ahead, axis=-1, keepdims=True), 1e-9)


def heading(joints: ArrayLike) -> Doubles:
    """Unwrapped heading ``[T]`` in radians, positive to the left, 0 facing +Z."""
    ahead = facing(joints)
    return np.unwrap(np.arctan2(ahead[:, 0], ahead[:, 1]))


def turned(joints: ArrayLike) -> float:
    """Net turn in radians, positive to the left."""
    angle = heading(joints)
    return float(angle[-1] - angle[0])


def steps(joints: ArrayLike) -> Doubles:
    """Smoothed steps of the pelvis over the floor ``[T - 1, 2]``, metres a frame."""
    return np.diff(_smooth(figure(joints)[:, PELVIS][:, FLOOR]), axis=0)


def path(joints: ArrayLike) -> float:
    """Length of the pelvis's smoothed path over the floor, metres."""
    return float(np.linalg.norm(steps(joints), axis=-1).sum())


def ahead(joints: ArrayLike) -> float:
    """How far the figure goes the way it faces, metres; negative backwards."""
    return float((steps(joints) * facing(joints)[:-1]).sum())


def net_travel(joints: ArrayLike) -> float:
    """Distance on the floor from the first frame to the last, metres."""
    root = figure(joints)[:, PELVIS][:, FLOOR]
    return float(np.linalg.norm(root[-1] - root[0]))


def pace(joints: ArrayLike, seconds: float = 2.0) -> float:
    """Speed over the floor in the fastest ``seconds`` (or the whole clip where it is shorter), metres a second."""
    lengths = np.linalg.norm(steps(joints), axis=-1)
    if not len(lengths):
        return 0.0
    count = min(len(lengths), max(1, round(seconds * FPS)))
    total = np.concatenate(([0.0], lengths.cumsum()))
    return float((total[count:] - total[:-count]).max() / count * FPS)


def trunk(joints: ArrayLike) -> float:
    """Median height of the head above the pelvis, metres: 0.53 upright, 0.45 stooped, negative upside down."""
    x = figure(joints)
    return float(np.median(x[:, HEAD, 1] - x[:, PELVIS, 1]))


def pelvis_height(joints: ArrayLike) -> float:
    """Median height of the pelvis above the lowest standing foot (its 5th percentile), metres."""
    x = figure(joints)
    return float(np.median(x[:, PELVIS, 1]) - np.percentile(x[:, TOES, 1].min(axis=-1), 5))


def pelvis_range(joints: ArrayLike) -> float:
    """How far the pelvis goes up and down in all, metres."""
    return float(np.ptp(figure(joints)[:, PELVIS, 1]))


def limb_speed(joints: ArrayLike) -> float:
    """Mean speed of wrists, elbows and ankles relative to the pelvis, metres a second."""
    x = figure(joints)
    if len(x) < 2:
        return 0.0
    limbs = x[:, ANKLES + ELBOWS + WRISTS] - x[:, :1]
    return float(np.linalg.norm(np.diff(limbs, axis=0), axis=-1).mean() * FPS)


def peak_speed(joints: ArrayLike) -> float:
    """The 98th percentile in time of the fastest hand's or foot's speed relative to the pelvis, metres a second."""
    x = figure(joints)
    if len(x) < 3:
        return 0.0
    ends = x[:, ANKLES + WRISTS] - x[:, :1]
    return float(np.percentile(np.linalg.norm(ends[2:] - ends[:-2], axis=-1).max(-1) / 2 * FPS, 98))


def _stretches(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and one past the last frame of every unbroken run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def flights(
    joints: ArrayLike, *, clear: float = 0.05, top: float = 0.1, rise: float = 0.08, frames: int = 4, longest: int = 30
) -> list[tuple[int, int]]:
    """Stretches (first, one past the last frame) in which the figure is in the air.

    Both toe joints are ``clear`` metres above where that foot stands (the 5th percentile of its height) for ``frames`` to
    ``longest`` frames between a take-off and a landing, at some moment both ``top`` metres above, and the pelvis gets
    ``rise`` metres above its median height.
    """
    x = figure(joints)
    toes = x[:, TOES, 1]
    lower = (toes - np.percentile(toes, 5, axis=0)).min(axis=-1)
    pelvis = x[:, PELVIS, 1] - np.median(x[:, PELVIS, 1])
    return [
        (a, b)
        for a, b in _stretches(lower > clear)
        if frames <= b - a <= longest and a > 0 and b < len(x) and lower[a:b].max() >= top and pelvis[a:b].max() >= rise
    ]


def reversals(signal: Doubles, swing: float) -> list[int]:
    """Frames at which a signal ``[T]`` turns back after having moved at least ``swing`` one way."""
    turns: list[int] = []
    low = high = 0
    direction = 0
    for t, value in enumerate(signal):
        if value > signal[high]:
            high = t
        if value < signal[low]:
            low = t
        if direction >= 0 and signal[high] - value >= swing:
            if direction > 0:
                turns.append(high)
            direction, low = -1, t
        elif direction <= 0 and value - signal[low] >= swing:
            if direction < 0:
                turns.append(low)
            direction, high = 1, t
    return turns


def _chains(turns: list[int], within: int) -> list[list[int]]:
    """The turns in runs whose neighbours are no more than ``within`` frames apart."""
    chains: list[list[int]] = []
    for turn in turns:
        if chains and turn - chains[-1][-1] <= within:
            chains[-1].append(turn)
        else:
            chains.append([turn])
    return chains


def kick_height(joints: ArrayLike, *, stretch: float = 0.65) -> float:
    """Greatest height that an ankle keeps above the other knee for two frames, metres, while its leg is stretched to
    ``stretch`` metres and the head is above the pelvis; minus infinity when there is no such moment."""
    x = figure(joints)
    best = -np.inf
    for side in (0, 1):
        foot, knee = x[:, ANKLES[side]], x[:, KNEES[1 - side]]
        fine = (np.linalg.norm(foot - x[:, HIPS[side]], axis=-1) > stretch) & (x[:, HEAD, 1] > x[:, PELVIS, 1])
        above = np.where(fine, (foot - knee)[:, 1], -np.inf)
        best = max(best, float(np.minimum(above[1:], above[:-1]).max(initial=-np.inf)))
    return best


def strike_speed(joints: ArrayLike, *, reach: float = 0.45, gain: float = 0.2, slope: float = 0.35) -> float:
    """Greatest forward speed of a fist that ends in a stretched arm, metres a second relative to the pelvis.

    Within four frames the wrist is ``reach`` metres from its shoulder, ``gain`` more than at its nearest in the eight frames
    before, 0.3 m ahead of the pelvis and no more than ``slope`` metres above or below the shoulder. 0.0 where there is none.
    """
    x = figure(joints)
    if len(x) < 3:
        return 0.0
    front = facing(x)
    best = 0.0
    for side in (0, 1):
        arm, fist = x[:, WRISTS[side]] - x[:, SHOULDERS[side]], x[:, WRISTS[side]] - x[:, PELVIS]
        length = np.linalg.norm(arm, axis=-1)
        struck = (length > reach) & ((fist[:, FLOOR] * front).sum(-1) > 0.3) & (np.abs(arm[:, 1]) < slope)
        velocity = np.zeros_like(fist)
        velocity[1:-1] = (fist[2:] - fist[:-2]) / 2 * FPS
        speed = (velocity[:, FLOOR] * front).sum(-1)
        # An uppercut or an arm thrown up moves more upwards than forwards.
        speed[np.abs(velocity[:, 1]) >= speed] = 0.0
        for t in np.flatnonzero(speed > best):
            end = length[t : t + 5][struck[t : t + 5]].max(initial=0.0)
            if end - length[max(0, t - 8) : t + 1].min() > gain:
                best = max(best, float(speed[t]))
    return best


def wave_reversals(joints: ArrayLike, *, swing: float = 0.05, within: int = 16) -> int:
    """Most sideways reversals in a row of a wrist held above its shoulder, no more than ``within`` frames apart."""
    x = figure(joints)
    front = facing(x)
    left = np.stack((front[:, 1], -front[:, 0]), -1)
    best = 0
    for side in (0, 1):
        arm = x[:, WRISTS[side]] - x[:, SHOULDERS[side]]
        sideways = (arm[:, FLOOR] * left).sum(-1)
        for a, b in _stretches(arm[:, 1] > 0):
            best = max(best, *map(len, _chains(reversals(sideways[a:b], swing), within)), 0)
    return best


def dribble_reversals(joints: ArrayLike, *, swing: float = 0.08, within: int = 20, upright: float = 0.8) -> int:
    """Most up-and-down reversals in a row of a wrist at waist height, no more than ``within`` frames apart.

    Waist height is 0.3 m below to 0.4 m above the pelvis. From the first reversal to the last the wrist is ahead of the pelvis
    on average, and its way up and down is ``upright`` of its way over the floor or more (a runner's arm swings forwards).
    """
    x = figure(joints)
    front = facing(x)
    best = 0
    for side in (0, 1):
        hand = x[:, WRISTS[side]] - x[:, PELVIS]
        ahead_of_pelvis = (hand[:, FLOOR] * front).sum(-1)
        steps_of_hand = np.diff(hand, axis=0)
        for a, b in _stretches((hand[:, 1] > -0.3) & (hand[:, 1] < 0.4)):
            for chain in _chains(reversals(hand[a:b, 1], swing), within):
                first, last = a + chain[0], a + chain[-1]
                moved = steps_of_hand[first:last]
                vertical, level = np.abs(moved[:, 1]).sum(), np.linalg.norm(moved[:, FLOOR], axis=-1).sum()
                if vertical > upright * level and ahead_of_pelvis[first : last + 1].mean() > 0:
                    best = max(best, len(chain))
    return best
