"""Planted feet held still: the slide of true contacts taken out of a motion after the fact.

The tool published with MotionMillion (section 5) calls a foot in contact wherever a loose test on its squared step says
so, which is nearly every frame of its own examples, and it turns every joint and doubles the frame rate. This one
differs on purpose: it holds only feet that come to rest on the floor (``kinetok.motion.footplants``), moves only legs
and, where a leg is too short, the root, and keeps bones and frame rate.
"""

from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.kernels.kinematics import forward_kinematics
from kinetok.motion import quality
from kinetok.motion.footplants import RADIUS, Plant, find_plants
from kinetok.motion.ik import bend_leg, swing, unit
from kinetok.motion.motion import Motion
from kinetok.motion.skeleton import JOINT_NAMES, PARENTS

Doubles = NDArray[np.float64]

LEGS = tuple(
    tuple(JOINT_NAMES.index(f"{side}_{joint}") for joint in ("hip", "knee", "ankle", "foot"))
    for side in ("left", "right")
)
BLEND = 0.2  # seconds in which a correction comes and goes
LEAVE_SPEED = 0.2  # metres a second: no faster does a correction leave a plant, so that it does not overshoot
REACH = 0.995  # of a leg's length: the root comes closer before a leg is straighter than this, or than it was
ROOT_SMOOTHING = 0.083  # seconds, deviation of the Gaussian
LOWEST_FOOT, LOWEST_PERCENTILE = 0.02, 3  # metres; where --floor puts the lowest foot joint, as in data/cmu
MOVED = 1e-4  # metres from which a joint counts as moved


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanupReport:
    """What ``clean_feet`` found and changed. ``slide`` is the mean horizontal step of planted joints, centimetres a frame;
    skate, jerk and penetration are those of ``kinetok.motion.quality``; ``largest_miss_cm`` is how far an ankle
    stayed away from its place because the leg was too short."""

    contacts: int
    frames: int
    frames_changed: int
    largest_displacement_cm: float
    largest_root_shift_cm: float
    largest_miss_cm: float
    floor_shift_cm: float
    slide_before: float
    slide_after: float
    skate_before: float
    skate_after: float
    jerk_before: float
    jerk_after: float
    penetration_before: float
    penetration_after: float

    @property
    def jerk_ratio(self) -> float:
        """Jerk after over jerk before; 1.0 where neither moves."""
        return self.jerk_after / self.jerk_before if self.jerk_before > 0 else 1.0

    def __str__(self) -> str:
        if not self.frames_changed:
            return f"feet: {self.contacts} contacts, nothing to change"
        return (
            f"feet: {self.contacts} contacts, {self.frames_changed} of {self.frames} frames changed by up to "
            f"{self.largest_displacement_cm:.1f} cm; foot skate {self.skate_before:.2f} -> {self.skate_after:.2f} cm a "
            f"frame, jerk x{self.jerk_ratio:.2f}"
        )

    def to_json(self) -> dict[str, float]:
        """The fields and ``jerk_ratio``, rounded to 4 decimals."""
        return {name: round(value, 4) for name, value in {**asdict(self), "jerk_ratio": self.jerk_ratio}.items()}


def clean_feet(motion: Motion, *, move_root: bool = True, shift_floor: bool = False) -> tuple[Motion, CleanupReport]:
    """Hold every planted ankle and toe joint in its place; corrections come and go within ``BLEND`` seconds.

    ``move_root`` lets the root give way, smoothly, where a leg would have to stretch; without it the foot falls short.
    ``shift_floor`` first moves the whole clip up or down so that its feet stand on y = 0. The frame rate and the bones
    stay; a motion without anything to correct comes back as it is. Raises ``UserError`` for legs without length.
    """
    rotations, root, offsets = (x.astype(np.float64) for x in (motion.rotations, motion.root, motion.offsets))
    lengths = np.linalg.norm(offsets, axis=-1)
    if not all(lengths[joint] > 1e-6 for _, knee, ankle, _ in LEGS for joint in (knee, ankle)):
        raise UserError("expected thighs and shanks with a length, got offsets of zero: these feet cannot be cleaned")
    joints, turns = _kinematics(rotations, root, offsets)
    lift = 0.0
    if shift_floor:
        lowest = joints[:, quality.FOOT_JOINTS, 1].min(axis=1)
        lift = LOWEST_FOOT - float(np.percentile(lowest, LOWEST_PERCENTILE))
        up = np.array([0.0, lift, 0.0])
        joints, root = joints + up, root + up
    contact = quality.contacts(joints, motion.fps)
    target, plants = joints.copy(), []
    for side, (_, _, ankle, foot) in enumerate(LEGS):
        of_joint = [
            find_plants(joints[:, j], contact[:, 2 * side + i], motion.fps) for i, j in enumerate((ankle, foot))
        ]
        moved_to = _foot_targets(joints[:, ankle], joints[:, foot], of_joint[0], of_joint[1], motion.fps)
        target[:, ankle], target[:, foot] = moved_to
        plants += [(joint, plant) for joint, found in zip((ankle, foot), of_joint, strict=True) for plant in found]
    shift = _root_shift(joints, target, lengths, motion.fps) if move_root else np.zeros_like(root)
    moved = (np.abs(target - joints).max(axis=(1, 2)) > 0) | (np.abs(shift).max(axis=1) > 1e-6)
    shift[~moved] = 0.0
    rotations[moved] = _solve(rotations, joints, turns, target, shift, moved)
    cleaned = motion
    if moved.any() or lift:
        cleaned = Motion(rotations=rotations, root=root + shift, offsets=offsets, fps=motion.fps, text=motion.text)
    return cleaned, _report(motion, cleaned, plants, target, shift, lift)


def _kinematics(rotations: Doubles, root: Doubles, offsets: Doubles) -> tuple[Doubles, Doubles]:
    local, origin, bones = (torch.from_numpy(array) for array in (rotations, root, offsets))
    joints, turns = forward_kinematics(local, origin, bones, PARENTS)
    return joints.numpy(), turns.numpy()


def _foot_targets(
    ankle: Doubles, foot: Doubles, ankle_plants: list[Plant], foot_plants: list[Plant], fps: float
) -> tuple[Doubles, Doubles]:
    """Where ankle and toe joint ``[T, 3]`` go. One that is not planted follows the other, so that the foot keeps its
    direction; the bone between them keeps its length, and the toe joint has the last word."""
    by_ankle, ankle_weight = _correction(ankle, ankle_plants, fps)
    by_foot, foot_weight = _correction(foot, foot_plants, fps)
    difference = by_foot - by_ankle
    move_ankle = by_ankle + ((1 - ankle_weight) * foot_weight)[:, None] * difference
    move_foot = by_foot - ((1 - foot_weight) * ankle_weight)[:, None] * difference
    new_ankle, new_foot = ankle + move_ankle, foot + move_foot
    bone = np.linalg.norm(foot - ankle, axis=-1, keepdims=True)
    apart = np.abs(move_ankle - move_foot).max(axis=-1) > 0
    new_ankle[apart] = (new_foot - unit(new_foot - new_ankle) * bone)[apart]
    return new_ankle, new_foot


def _correction(path: Doubles, plants: list[Plant], fps: float) -> tuple[Doubles, Doubles]:
    """What to add to ``path [T, 3]`` so that it rests during its plants, and how planted it is, 0..1 ``[T]``.

    Between plants the correction is a cubic Hermite curve: it leaves a plant so that the joint speeds up from rest as it
    did, is zero after ``BLEND`` seconds, or runs straight on to a plant that is closer than two of these.
    """
    frames, reach = len(path), max(2, round(BLEND * fps))
    # x, y, z and the weight in one curve.
    curve = np.zeros((frames, 4))
    ends: list[list[tuple[int, Doubles, Doubles]]] = []
    for plant in plants:
        stay = slice(plant.start, plant.end)
        if plant.place is not None:
            place = plant.place.copy()
            if -RADIUS < place[1] < 0:  # deeper, the clip's floor lies elsewhere
                place[1] = 0.0
            curve[stay, :3] = place - path[stay]
        curve[stay, 3] = 1.0
        first, last = plant.start, plant.end - 1
        moves = plant.place is not None
        ends.append(
            [
                (first, curve[first], _leave(path, first - 1, first, moves, fps)),
                (last, curve[last], _leave(path, last, last + 1, moves, fps)),
            ]
        )
    zero = np.zeros(4)
    before, after = -2 * reach - 1, frames + 2 * reach
    sides = [[(before, zero, zero)], *ends, [(after, zero, zero)]]
    for left, right in pairwise(sides):
        a, b = left[-1], right[0]
        knots = [a, b]
        if b[0] - a[0] > 2 * reach:
            knots = [a, (a[0] + reach, zero, zero), (b[0] - reach, zero, zero), b]
        for (t0, value0, slope0), (t1, value1, slope1) in pairwise(knots):
            t = np.arange(max(t0 + 1, 0), min(t1, frames))
            u = ((t - t0) / (t1 - t0))[:, None]
            curve[t] = (
                (1 + 2 * u) * (1 - u) ** 2 * value0
                + u * (1 - u) ** 2 * (t1 - t0) * slope0
                + u**2 * (3 - 2 * u) * value1
                - u**2 * (1 - u) * (t1 - t0) * slope1
            )
    return curve[:, :3], curve[:, 3]


def _leave(path: Doubles, earlier: int, later: int, moves: bool, fps: float) -> Doubles:
    """The correction's slope per frame at the edge of a plant: it cancels the step there, up to ``LEAVE_SPEED``."""
    slope = np.zeros(4)
    if moves and earlier >= 0 and later < len(path):
        step = path[later] - path[earlier]
        slope[:3] = -step * min(1.0, LEAVE_SPEED / max(float(np.linalg.norm(step)) * fps, 1e-9))
    return slope


def _root_shift(joints: Doubles, target: Doubles, lengths: Doubles, fps: float) -> Doubles:
    """A smooth movement of the root ``[T, 3]`` that spares legs from stretching to their targets."""
    shift = np.zeros_like(joints[:, 0])
    # Each leg pulls the root in turn; a few rounds settle what both want.
    for _ in range(4):
        for hip, knee, ankle, _ in LEGS:
            wanted = target[:, ankle] - joints[:, hip] - shift
            before = np.linalg.norm(joints[:, ankle] - joints[:, hip], axis=-1)
            distance = np.linalg.norm(wanted, axis=-1)
            longest = np.maximum(before, REACH * (lengths[knee] + lengths[ankle]))
            changed = np.abs(target[:, ankle] - joints[:, ankle]).max(axis=-1) > 0
            excess = np.where(changed, np.maximum(distance - longest, 0.0), 0.0)
            shift += unit(wanted) * excess[:, None]
    if not shift.any():
        return shift
    deviation = ROOT_SMOOTHING * fps
    reach = max(1, round(3 * deviation))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(shift, ((reach, reach), (0, 0)), mode="edge")
    return np.stack([np.convolve(padded[:, axis], kernel, "valid") for axis in range(3)], axis=1)


def _solve(
    rotations: Doubles, joints: Doubles, turns: Doubles, target: Doubles, shift: Doubles, moved: NDArray[np.bool_]
) -> Doubles:
    """Local rotations of the ``moved`` frames with ankles and feet at their targets, the root shifted."""
    rotations, joints, turns, target = rotations[moved], joints[moved], turns[moved], target[moved]
    joints = joints + shift[moved, None]
    pelvis = turns[:, 0]
    for hip, knee, ankle, foot in LEGS:
        thigh, shank = bend_leg(
            joints[:, hip], joints[:, knee], joints[:, ankle], target[:, ankle], turns[:, hip, :, 2]
        )
        new_hip, new_knee = thigh @ turns[:, hip], shank @ turns[:, knee]
        direction = swing(joints[:, foot] - joints[:, ankle], target[:, foot] - target[:, ankle])
        rotations[:, hip] = pelvis.swapaxes(-1, -2) @ new_hip
        rotations[:, knee] = new_hip.swapaxes(-1, -2) @ new_knee
        rotations[:, ankle] = new_knee.swapaxes(-1, -2) @ direction @ turns[:, ankle]
    return rotations


def _report(
    before: Motion, after: Motion, plants: list[tuple[int, Plant]], target: Doubles, shift: Doubles, lift: float
) -> CleanupReport:
    x, y = before.joints.astype(np.float64), after.joints.astype(np.float64)
    ankles = [leg[2] for leg in LEGS]
    # The target moves with nothing: where a leg was too short, the difference is what is missing.
    miss = np.linalg.norm(y[:, ankles] - target[:, ankles], axis=-1).max() if after is not before else 0.0
    displacement = np.linalg.norm(y - x, axis=-1).max(axis=1)
    slides = [
        [
            np.linalg.norm(np.diff(z[plant.start : plant.end, joint][:, [0, 2]], axis=0), axis=-1)
            for joint, plant in plants
        ]
        for z in (x, y)
    ]
    slide_before, slide_after = (100 * float(np.concatenate(s).mean()) if plants else 0.0 for s in slides)
    return CleanupReport(
        contacts=len(plants),
        frames=len(before),
        frames_changed=int((displacement > MOVED).sum()),
        largest_displacement_cm=100 * float(displacement.max()),
        largest_root_shift_cm=100 * float(np.linalg.norm(shift, axis=-1).max()),
        largest_miss_cm=100 * float(miss),
        floor_shift_cm=100 * lift,
        slide_before=slide_before,
        slide_after=slide_after,
        skate_before=quality.foot_skate(x),
        skate_after=quality.foot_skate(y),
        jerk_before=quality.jerk(x, before.fps),
        jerk_after=quality.jerk(y, after.fps),
        penetration_before=quality.penetration(x),
        penetration_after=quality.penetration(y),
    )
