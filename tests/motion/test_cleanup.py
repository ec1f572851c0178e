"""Foot clean-up: what slides is held, what does not touch is left alone, bones and frame rate stay."""

import json

import numpy as np
import pytest

from kinetok.errors import UserError
from kinetok.motion import Motion, quality
from kinetok.motion.cleanup import LEGS, clean_feet
from kinetok.motion.footplants import find_plants
from kinetok.motion.ik import bend_leg, swing
from kinetok.motion.skeleton import PARENTS


def about_x(angle):
    c, s, zero = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    return np.stack([zero + 1, zero, zero, zero, c, -s, zero, s, c], -1).reshape(*angle.shape, 3, 3)


def still(frames: int = 60, bend: float = 0.3, height: float = 0.0) -> Motion:
    """Stands with bent knees, ``height`` metres over the floor."""
    rotations = np.tile(np.eye(3), (frames, 22, 1, 1))
    for hip, knee, ankle, _ in LEGS:
        for joint, share in ((hip, -1.0), (knee, 2.0), (ankle, -1.0)):
            rotations[:, joint] = about_x(np.full(frames, share * bend))
    root = np.tile([0.0, 0.0, 0.0], (frames, 1))
    low = Motion(rotations=rotations, root=root).joints[0, :, 1].min()
    root[:, 1] = 0.02 - low + height
    return Motion(rotations=rotations, root=root, text="stands")


def walk(slide: float = 0.15, seconds: float = 3.0, fps: float = 30.0) -> Motion:
    """A walk in place of legs that lift in turn, while the whole body slides forward at ``slide`` metres a second."""
    base = still(round(seconds * fps))
    rotations, root = base.rotations.astype(np.float64), base.root.astype(np.float64)
    phase = 2 * np.pi * np.arange(len(base)) / fps
    for side, (hip, knee, ankle, _) in enumerate(LEGS):
        lift = 0.6 * np.maximum(np.sin(phase + side * np.pi), 0.0) ** 2
        for joint, share in ((hip, -1.0), (knee, 2.0), (ankle, -1.0)):
            rotations[:, joint] = about_x(share * (0.3 + lift))
    root[:, 2] += slide * np.arange(len(base)) / fps
    return Motion(rotations=rotations, root=root, fps=fps, text="walks")


def bones(motion: Motion) -> np.ndarray:
    joints = motion.joints.astype(np.float64)
    return np.linalg.norm(joints[:, 1:] - joints[:, list(PARENTS[1:])], axis=-1)


@pytest.mark.parametrize("fps", [30.0, 60.0, 24.0])
def test_a_sliding_walk_slides_less(fps):
    motion = walk(fps=fps)
    cleaned, report = clean_feet(motion)
    assert report.contacts > 0 and report.slide_after < 0.25 * report.slide_before
    assert report.skate_after < report.skate_before and report.jerk_ratio <= 1.2
    assert (cleaned.fps, len(cleaned), cleaned.text) == (fps, len(motion), "walks")
    np.testing.assert_allclose(bones(cleaned), bones(motion), atol=2e-6)
    np.testing.assert_array_equal(cleaned.offsets, motion.offsets)


def test_the_report_holds_what_was_measured():
    motion = walk()
    cleaned, report = clean_feet(motion)
    away = np.linalg.norm(cleaned.joints.astype(float) - motion.joints, axis=-1).max(axis=1)
    assert report.largest_displacement_cm == pytest.approx(100 * away.max())
    assert report.frames_changed == (away > 1e-4).sum()
    assert report.skate_before == quality.foot_skate(motion.joints)
    assert report.skate_after == quality.foot_skate(cleaned.joints)
    assert report.jerk_after == quality.jerk(cleaned.joints, 30.0)
    assert set(json.loads(json.dumps(report.to_json()))) >= {"contacts", "jerk_ratio", "largest_displacement_cm"}
    assert f"{report.contacts} contacts" in str(report) and "\n" not in str(report)


def test_only_legs_and_root_move():
    motion = walk()
    cleaned, _ = clean_feet(motion, move_root=False)
    legs = {joint for hip, knee, ankle, _ in LEGS for joint in (hip, knee, ankle)}
    others = [joint for joint in range(22) if joint not in legs]
    np.testing.assert_array_equal(cleaned.rotations[:, others], motion.rotations[:, others])
    np.testing.assert_array_equal(cleaned.root, motion.root)
    assert np.abs(cleaned.rotations - motion.rotations).max() > 1e-3


def test_a_second_time_changes_little():
    cleaned, first = clean_feet(walk())
    _, second = clean_feet(cleaned)
    assert second.largest_displacement_cm < 0.5 * first.largest_displacement_cm


def test_a_flight_is_not_nailed():
    """Feet that move freely in the air, and those at the turning point of a hop, are left where they are."""
    motion = walk()
    high = Motion(rotations=motion.rotations, root=motion.root + np.array([0, 0.5, 0]), fps=30.0)
    assert clean_feet(high)[0] is high and clean_feet(high)[1].contacts == 0
    base = still(30)
    root = base.root.astype(np.float64)
    t = (np.arange(30) - 15) / 30.0
    # Free fall that turns 5 cm over the floor, as a hop with its feet tucked does.
    root[:, 1] += np.abs(0.05 - 4.905 * t**2)
    root[:, 2] += 0.3 * t
    turning = slice(12, 19)
    hop = Motion(rotations=base.rotations[turning], root=root[turning], fps=30.0)
    assert clean_feet(hop)[1].contacts == 0


def test_a_fast_slide_is_no_contact():
    motion = walk(slide=2.0)
    cleaned, report = clean_feet(motion)
    assert report.contacts == 0 and cleaned is motion
    assert "nothing to change" in str(report)


def test_a_still_motion_is_unchanged():
    motion = still()
    cleaned, report = clean_feet(motion)
    assert cleaned is motion and report.frames_changed == 0 and report.jerk_ratio == 1.0


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_clips(frames):
    whole = walk()
    motion = Motion(rotations=whole.rotations[:frames], root=whole.root[:frames])
    cleaned, report = clean_feet(motion)
    assert len(cleaned) == frames == report.frames and np.isfinite(cleaned.joints).all()


def test_the_floor():
    motion = still(height=0.3)
    cleaned, report = clean_feet(motion, shift_floor=True)
    assert report.floor_shift_cm == pytest.approx(-30.0, abs=1e-3)
    assert cleaned.joints[..., 1].min() == pytest.approx(0.02, abs=1e-5)


def test_what_cannot_be_cleaned():
    motion = walk()
    rotations = motion.rotations.copy()
    rotations[3, 4, 0, 0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        clean_feet(Motion(rotations=rotations, root=motion.root))
    with pytest.raises(UserError, match="length"):
        clean_feet(Motion(rotations=motion.rotations, root=motion.root, offsets=np.zeros((22, 3))))


def test_one_long_slow_slide_is_not_one_place():
    path = np.zeros((90, 3))
    path[:, 2] = 0.3 * np.arange(90) / 30
    assert find_plants(path, np.ones(90, bool), 30.0) == []
    path[30:] = path[30]
    (plant,) = find_plants(path, np.ones(90, bool), 30.0)
    assert plant.end == 90 and 25 <= plant.start <= 31


def test_inverse_kinematics_reaches():
    rng = np.random.default_rng(0)
    hip, knee, ankle = rng.normal(size=(3, 200, 3)) + np.array([[[0, 0, 0]], [[0, -3, 1]], [[0, -6, 0]]])
    upper, lower = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (knee - hip, ankle - knee))
    direction = rng.normal(size=(200, 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    # Targets from half to nearly all of the reach, always possible for the two bones.
    nearest = np.abs(upper - lower) + 0.05
    target = hip + direction * (nearest + rng.uniform(0.3, 0.95, (200, 1)) * (upper + lower - nearest))
    thigh, shank = bend_leg(hip, knee, ankle, target, np.tile([0.0, 0.0, 1.0], (200, 1)))
    new_knee = hip + np.einsum("tij,tj->ti", thigh, knee - hip)
    reached = new_knee + np.einsum("tij,tj->ti", shank, ankle - knee)
    np.testing.assert_allclose(reached, target, atol=1e-9)
    for turn in (thigh, shank):
        np.testing.assert_allclose(turn @ turn.swapaxes(-1, -2), np.tile(np.eye(3), (200, 1, 1)), atol=1e-12)
        np.testing.assert_allclose(np.linalg.det(turn), 1.0, atol=1e-12)


def test_swing_of_opposite_and_of_no_direction():
    x = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0], [0, 0, 2.0]])
    turn = swing(x, -x)
    np.testing.assert_allclose(np.einsum("tij,tj->ti", turn, x), -x, atol=1e-12)
    np.testing.assert_allclose(turn[2], np.eye(3))
    np.testing.assert_allclose(swing(x, x), np.tile(np.eye(3), (4, 1, 1)), atol=1e-12)
