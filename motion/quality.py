"""How good a motion looks in numbers: smoothness, feet on the floor, distance to another motion.

Joints are ``[T, 22, 3]`` in metres with Y up and the floor at ``y = 0``; arithmetic is float64. A clip too short for a
measure (one frame has no speed, three frames have no jerk) gives 0.0, never an error.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kinetok.errors import UserError
from kinetok.motion.skeleton import JOINT_NAMES, JOINTS

if TYPE_CHECKING:
    from kinetok.motion.motion import Motion

Doubles = NDArray[np.float64]

FOOT_JOINTS = tuple(JOINT_NAMES.index(name) for name in ("left_ankle", "left_foot", "right_ankle", "right_foot"))
# Joint heights in metres below which a foot can stand: captured people stand with ankles at 0.06-0.12 and toe joints at
# 0.02-0.08, most of the spread being shoes and marker sets.
CONTACT_HEIGHT = (0.15, 0.10, 0.15, 0.10)
CONTACT_SPEED = 0.5  # metres a second
# The slide of a foot counts fully on the floor and not at all from these heights on.
SKATE_HEIGHT = (0.12, 0.06, 0.12, 0.06)


def _joints(joints: ArrayLike, name: str = "joints") -> Doubles:
    x = np.asarray(joints, dtype=np.float64)
    if x.ndim != 3 or x.shape[1:] != (JOINTS, 3):
        raise UserError(f"{name}: expected the shape [T, {JOINTS}, 3], got {list(x.shape)}")
    return x


def _mean(x: Doubles) -> float:
    return float(x.mean()) if x.size else 0.0


def jerk(joints: ArrayLike, fps: float) -> float:
    """Mean length of the third difference of every joint's position, metres a second^3; 0.0 below four frames."""
    return _mean(np.linalg.norm(np.diff(_joints(joints), n=3, axis=0), axis=-1)) * fps**3


def acceleration_per_frame(joints: ArrayLike, reduce: Literal["mean", "max"] = "mean") -> Doubles:
    """Acceleration of the pose ``[T - 2]``, metres a frame^2 (section 7): length of the second difference of the joints
    relative to the pelvis, mean or maximum over the joints. Empty below three frames."""
    if reduce not in ("mean", "max"):
        raise UserError(f"reduce: expected mean or max, got {reduce!r}")
    x = _joints(joints)
    if len(x) < 3:
        return np.zeros(0)
    length = np.linalg.norm(np.diff(x - x[:, :1], n=2, axis=0), axis=-1)
    return np.asarray(getattr(length, reduce)(axis=-1))


def acceleration(joints: ArrayLike, fps: float | None = None, reduce: Literal["mean", "max"] = "mean") -> float:
    """Mean over frames of ``acceleration_per_frame``: metres a frame^2, or metres a second^2 where fps is given."""
    return _mean(acceleration_per_frame(joints, reduce)) * (1.0 if fps is None else fps**2)


def mpjpe_per_frame(a: ArrayLike, b: ArrayLike) -> Doubles:
    """Mean distance of corresponding joints, both relative to their pelvis: ``[T]`` metres (section 7)."""
    x, y = _joints(a, "a"), _joints(b, "b")
    if len(x) != len(y):
        raise UserError(f"mpjpe compares motions of one length, got {len(x)} and {len(y)} frames: cut the longer one")
    return np.linalg.norm((x - x[:, :1]) - (y - y[:, :1]), axis=-1).mean(axis=-1)


def mpjpe(a: ArrayLike, b: ArrayLike) -> float:
    """Mean over frames of ``mpjpe_per_frame``, metres; 0.0 for no frames."""
    return _mean(mpjpe_per_frame(a, b))


def contacts(joints: ArrayLike, fps: float) -> NDArray[np.bool_]:
    """Which foot joints stand on the floor: bool ``[T, 4]`` (left ankle, left foot, right ankle, right foot).

    A joint stands at frame t when it is lower than ``CONTACT_HEIGHT`` there and moves from t to t + 1 slower than
    ``CONTACT_SPEED`` (all three axes). The last frame takes the speed of the frame before; a single frame has speed 0.
    """
    feet = _joints(joints)[:, FOOT_JOINTS]
    speed = np.zeros(feet.shape[:2])
    if len(feet) > 1:
        speed[:-1] = np.linalg.norm(np.diff(feet, axis=0), axis=-1) * fps
        speed[-1] = speed[-2]
    return (feet[..., 1] < CONTACT_HEIGHT) & (speed < CONTACT_SPEED)


def foot_skate(joints: ArrayLike) -> float:
    """How far a foot on the floor slides in one frame, centimetres; 0.0 where no foot comes near the floor.

    Each step from t to t + 1 of the four ``FOOT_JOINTS`` has its horizontal length d and a weight
    ``w = 2 - 2 ** (h / H)`` clipped to 0..1, h being the larger of its two heights and H the joint's ``SKATE_HEIGHT``.
    The result is ``100 * sum(w d) / sum(w)``. Height alone decides, as a speed limit would hide the feet that slide
    fastest. Times fps it is centimetres a second.
    """
    feet = _joints(joints)[:, FOOT_JOINTS]
    height = np.maximum(feet[1:, :, 1], feet[:-1, :, 1])
    slide = np.linalg.norm(np.diff(feet[..., [0, 2]], axis=0), axis=-1)
    # Far above the floor the power would overflow where the weight is 0 anyway.
    weight = np.clip(2.0 - np.exp2(np.minimum(height / SKATE_HEIGHT, 1.0)), 0.0, 1.0)
    total = float(weight.sum())
    return 100.0 * float((weight * slide).sum()) / total if total > 0 else 0.0


def penetration_per_frame(joints: ArrayLike) -> Doubles:
    """Depth of the lowest joint below the floor ``[T]``, centimetres, 0 above it."""
    return 100.0 * np.maximum(0.0, -_joints(joints)[..., 1].min(axis=-1))


def penetration(joints: ArrayLike) -> float:
    """Mean over frames of ``penetration_per_frame``, centimetres."""
    return _mean(penetration_per_frame(joints))


def travelled(joints: ArrayLike) -> float:
    """Length of the pelvis's path over the floor, metres."""
    return float(np.linalg.norm(np.diff(_joints(joints)[:, 0, [0, 2]], axis=0), axis=-1).sum())


def report(motion: "Motion") -> dict[str, float]:
    """All measures of one motion; the keys carry their units."""
    x, fps = motion.joints, motion.fps
    distance, skate, depth = travelled(x), foot_skate(x), penetration_per_frame(x)
    standing = np.asarray(motion.contacts.reshape(len(motion), 2, 2).any(axis=-1))
    return {
        "frames": float(len(motion)),
        "duration_s": motion.duration,
        "distance_m": distance,
        "speed_m_per_s": distance / motion.duration,
        "jerk_m_per_s3": jerk(x, fps),
        "acceleration_m_per_frame2": acceleration(x),
        "acceleration_m_per_s2": acceleration(x, fps),
        "foot_skate_cm_per_frame": skate,
        "foot_skate_cm_per_s": skate * fps,
        "penetration_cm": _mean(depth),
        "penetration_max_cm": float(depth.max()),
        "left_contact": float(standing[:, 0].mean()),
        "right_contact": float(standing[:, 1].mean()),
    }
