"""Foot clean-up on motions made for it: what it holds, what it leaves alone, and that it tells the truth."""

import json

import numpy as np
import pytest

from kinetok.errors import UserError
from kinetok.motion import Motion, quality
from kinetok.motion.cleanup import clean_feet
from kinetok.motion.footplants import HOLD_SPEED, RADIUS, SHORTEST, find_plants, intervals
from kinetok.motion.skeleton import CANONICAL_OFFSETS, JOINT_NAMES, PARENTS

FEET = list(quality.FOOT_JOINTS)
LEG = [1, 2, 4, 5, 7, 8, 10, 11]


def about_x(angle):
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    return np.stack((zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos), -1).reshape(*np.shape(angle), 3, 3)


def standing(frames, root, bend=0.35, fps=30.0):
    """A motion with bent knees and level feet whose toes stand 2 cm high where ``root [T, 3]`` is zero."""
    rotations = np.tile(np.eye(3), (frames, 22, 1, 1))
    bend = np.broadcast_to(np.asarray(bend, dtype=np.float64), (frames,))
    for hip, knee, ankle in ((1, 4, 7), (2, 5, 8)):
        rotations[:, hip], rotations[:, knee], rotations[:, ankle] = about_x(-bend), about_x(2 * bend), about_x(-bend)
    flat = Motion(rotations=rotations, root=np.zeros((frames, 3)), fps=fps)
    rise = 0.02 - flat.joints[0, FEET, 1].min()
    return Motion(rotations=rotations, root=root + np.array([0.0, rise, 0.0]), fps=fps, text="a person")


def slides(motion, frames=slice(None)):
    return np.linalg.norm(np.diff(motion.joints[frames, FEET].astype(np.float64), axis=0), axis=-1)


def sway(frames=60, size=0.02, period=40):
    t = np.arange(frames)
    root = np.zeros((frames, 3))
    root[:, 0] = size * np.sin(2 * np.pi * t / period)
    root[:, 2] = 0.5 * size * np.cos(2 * np.pi * t / period)
    return root


def bones(motion):
    x = motion.joints.astype(np.float64)
    return np.linalg.norm(x[:, 1:] - x[:, list(PARENTS[1:])], axis=-1)


def test_sliding_feet_are_held_and_the_body_goes_on_swaying():
    before = standing(60, sway())
    after, report = clean_feet(before)
    assert slides(before).max() > 2e-3 and slides(after).max() < 1e-5
    np.testing.assert_array_equal(after.root, before.root)
    others = [joint for joint in range(22) if joint not in LEG]
    np.testing.assert_array_equal(after.joints[:, others], before.joints[:, others])
    np.testing.assert_allclose(bones(after), bones(before), atol=1e-6)
    assert (after.fps, len(after), after.text) == (before.fps, len(before), before.text)
    assert report.contacts == 4 and report.frames_changed > 50
    assert report.slide_before > 0.1 and report.slide_after < 1e-3
    assert report.skate_after < 0.05 * report.skate_before
    assert report.jerk_after < report.jerk_before


def test_the_report_says_what_happened():
    before = standing(60, sway())
    after, report = clean_feet(before)
    moved = np.linalg.norm(after.joints - before.joints, axis=-1)
    assert report.largest_displacement_cm == pytest.approx(100 * moved.max(), rel=1e-4)
    assert report.frames_changed == (moved.max(axis=1) > 1e-4).sum()
    assert (report.frames, report.floor_shift_cm, report.largest_root_shift_cm) == (60, 0.0, 0.0)
    assert report.skate_before == pytest.approx(quality.foot_skate(before.joints))
    assert report.jerk_after == pytest.approx(quality.jerk(after.joints, 30.0), rel=1e-4)
    fields = json.loads(json.dumps(report.to_json()))
    assert fields["jerk_ratio"] == pytest.approx(report.jerk_after / report.jerk_before, abs=1e-4)
    line = str(report)
    assert "\n" not in line and "4 contacts" in line and f"{report.largest_displacement_cm:.1f} cm" in line


def test_a_second_time_changes_nothing():
    once, _ = clean_feet(standing(60, sway()))
    twice, report = clean_feet(once)
    assert np.abs(twice.joints - once.joints).max() < 1e-4
    assert report.frames_changed == 0 and "nothing to change" in str(report)


@pytest.mark.parametrize("root", [np.zeros((40, 3)), sway(40, 0.003)], ids=["still", "creeping"])
def test_clean_feet_come_back_as_they_are(root):
    motion = standing(40, root)
    cleaned, report = clean_feet(motion)
    assert cleaned is motion
    assert report.frames_changed == 0 and report.jerk_ratio == 1.0 and report.contacts > 0


def test_a_hop_is_not_nailed_at_its_top():
    # 6 cm high: every frame of the flight is low enough for a contact, and its top is slow enough.
    t = np.arange(60) / 30.0
    height = np.zeros(60)
    up = np.sqrt(2 * 9.81 * 0.06)
    for start in (0.5, 1.2):
        flight = (t > start) & (t < start + 2 * up / 9.81)
        height[flight] = up * (t[flight] - start) - 9.81 / 2 * (t[flight] - start) ** 2
    motion = standing(60, height[:, None] * [0.0, 1.0, 0.0])
    assert quality.contacts(motion.joints, 30.0)[height > 0.05].any(), "the plain contact test is fooled"
    cleaned, report = clean_feet(motion)
    assert cleaned is motion and report.contacts == 12


@pytest.mark.parametrize("speed", [1.0, 3.0])
def test_gliding_feet_are_not_nailed(speed):
    motion = standing(60, np.arange(60)[:, None] / 30.0 * np.array([0.0, 0.0, speed]))
    cleaned, report = clean_feet(motion)
    assert cleaned is motion and report.contacts == 0
    assert report.skate_after == report.skate_before > 1.0


def test_corrections_come_and_go_smoothly():
    # Standing, then a quick lift of the body and its feet, then standing elsewhere.
    t = np.arange(120)
    root = sway(120)
    swing = np.clip((t - 50) / 20.0, 0, 1)
    root[:, 2] += 0.8 * swing**2 * (3 - 2 * swing)
    root[:, 1] += 0.3 * np.sin(np.pi * swing) ** 2
    before = standing(120, root)
    after, report = clean_feet(before)
    correction = (after.joints - before.joints)[:, FEET].astype(np.float64)
    assert np.linalg.norm(np.diff(correction, axis=0), axis=-1).max() < 0.012
    assert report.jerk_ratio < 1.05
    np.testing.assert_array_equal(correction[59:62], 0.0), "the flight is left alone"
    assert slides(after, slice(0, 45)).max() < 1e-5 and slides(after, slice(76, 120)).max() < 1e-5


def test_a_leg_too_short_takes_the_root_along_or_falls_short():
    root = sway(60, 0.02, 40)
    root[:, 1] = root[:, 2]
    motion = standing(60, root, bend=0.01)
    free, moved = clean_feet(motion)
    fixed, held = clean_feet(motion, move_root=False)
    assert moved.largest_root_shift_cm > 0.3 and held.largest_root_shift_cm == 0.0
    np.testing.assert_array_equal(fixed.root, motion.root)
    assert moved.largest_miss_cm < held.largest_miss_cm
    offsets = np.array(CANONICAL_OFFSETS)
    length = np.linalg.norm(offsets[[4, 7]], axis=-1).sum()
    x = free.joints
    assert np.linalg.norm(x[:, 7] - x[:, 1], axis=-1).max() <= length + 1e-6


def test_the_floor_is_shifted_only_when_asked():
    high = standing(60, sway() + np.array([0.0, 0.06, 0.0]))
    plain, report = clean_feet(high)
    assert report.floor_shift_cm == 0.0 and plain.joints[..., 1].min() == pytest.approx(0.08, abs=5e-3)
    shifted, report = clean_feet(high, shift_floor=True)
    assert report.floor_shift_cm == pytest.approx(-6.0, abs=0.1)
    assert shifted.joints[:, FEET, 1].min() == pytest.approx(0.02, abs=2e-3)
    assert clean_feet(shifted, shift_floor=True)[1].floor_shift_cm == pytest.approx(0.0, abs=0.1)


def test_feet_a_little_under_the_floor_are_put_on_it_and_deeper_ones_are_not():
    sunk, _ = clean_feet(standing(60, sway() - np.array([0.0, 0.03, 0.0])))
    assert sunk.joints[5:55, [10, 11], 1].min() > -1e-4
    deep = standing(60, sway() - np.array([0.0, 0.3, 0.0]))
    assert clean_feet(deep)[0].joints[..., 1].min() == pytest.approx(deep.joints[..., 1].min(), abs=5e-3)


@pytest.mark.parametrize("fps", [20.0, 60.0, 120.0])
def test_other_frame_rates(fps):
    frames = round(2 * fps)
    before = standing(frames, sway(frames, 0.02, 1.33 * fps), fps=fps)
    after, report = clean_feet(before)
    assert after.fps == fps and len(after) == frames
    assert slides(after).max() < 1e-5 < slides(before).max() and report.contacts == 4


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_clips_too_short_for_a_contact(frames):
    motion = standing(frames, sway(frames))
    cleaned, report = clean_feet(motion)
    assert cleaned is motion and report.frames == frames


def test_legs_without_length_are_refused():
    offsets = np.array(CANONICAL_OFFSETS)
    offsets[JOINT_NAMES.index("left_knee")] = 0
    motion = Motion(rotations=np.tile(np.eye(3), (9, 22, 1, 1)), root=np.zeros((9, 3)), offsets=offsets)
    with pytest.raises(UserError, match="thighs and shanks"):
        clean_feet(motion)


def test_plants_keep_to_their_circle_and_come_to_rest():
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(0, 0.003, (400, 3)), axis=0)
    speed = np.linalg.norm(np.gradient(path, axis=0), axis=-1) * 30
    contact = rng.random(400) > 0.02
    plants = find_plants(path, contact, 30.0)
    assert plants
    for plant, following in zip(plants, [*plants[1:], None], strict=True):
        stay = slice(plant.start, plant.end)
        assert contact[stay].all() and speed[stay].max() < HOLD_SPEED
        assert plant.end - plant.start > SHORTEST * 30
        assert following is None or following.start >= plant.end
        if plant.place is not None:
            assert np.linalg.norm(path[stay] - plant.place, axis=-1).max() <= RADIUS


def test_intervals():
    assert intervals(np.array([True, True, False, True, False, False, True])) == [(0, 2), (3, 4), (6, 7)]
    assert intervals(np.zeros(3, dtype=bool)) == [] and intervals(np.zeros(0, dtype=bool)) == []


def test_against_the_published_tool(golden):
    """Section 5: the published tool calls every foot of its demo clips planted, whatever its speed. Ours differs by
    design: it finds far fewer, all of them slow, and nearly all of them among the published ones."""
    z = np.load(golden("foot_slide.npz"))
    at = {str(name).lower(): index for index, name in enumerate(z["bvh_order_names"])}
    order = [at[name] for name in JOINT_NAMES]
    for clip in ("case1_0", "case2_0", "case2_1"):
        joints = z[f"{clip}_joints_in"].astype(np.float64)[:, order]
        joints[..., 1] += 0.02 - np.percentile(joints[:, FEET, 1].min(axis=1), 3)
        contact, theirs = quality.contacts(joints, 30.0), z[f"{clip}_contact"].astype(bool)
        ours = np.zeros_like(theirs)
        for column, joint in enumerate(FEET):
            for plant in find_plants(joints[:, joint], contact[:, column], 30.0):
                ours[plant.start : plant.end, column] = True
        speed = np.linalg.norm(np.gradient(joints[:, FEET], axis=0), axis=-1) * 30
        assert ours.any() and ours.sum() < 0.7 * theirs.sum()
        assert speed[ours].max() < HOLD_SPEED < 0.95 < speed[theirs].max()
        assert (ours & theirs).sum() >= 0.95 * ours.sum()
