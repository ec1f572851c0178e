"""The leg solver against the law of cosines and against what it promises about bones, bend and reach."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.motion.ik import STRAIGHT, bend_leg, swing, unit

UPPER, LOWER = 0.4, 0.43


def apply(turn, vector):
    return (turn @ vector[..., None])[..., 0]


def leg(seed: int, frames: int = 6, bend: float = 0.6):
    """Hip, knee, ankle ``[T, 3]`` of legs bent forward by about ``bend`` radians, and the direction their knees go."""
    rng = np.random.default_rng(seed)
    hip = rng.normal(0, 0.3, (frames, 3))
    down = unit(np.array([0.0, -1.0, 0.0]) + rng.normal(0, 0.3, (frames, 3)))
    forward = unit(np.cross(np.array([1.0, 0.0, 0.0]), down))
    angle = bend * rng.uniform(0.5, 1.0, (frames, 1))
    knee = hip + UPPER * down
    ankle = knee + LOWER * (np.cos(angle) * down - np.sin(angle) * forward)
    return hip, knee, ankle, forward


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_swing_is_the_smallest_rotation(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 5, 3))
    turn = swing(a, b)
    np.testing.assert_allclose(turn @ turn.swapaxes(-1, -2), np.broadcast_to(np.eye(3), turn.shape), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(turn), 1.0, atol=1e-9)
    np.testing.assert_allclose(apply(turn, unit(a)), unit(b), atol=1e-9)
    angle = np.arccos(((np.trace(turn, axis1=-2, axis2=-1) - 1) / 2).clip(-1, 1))
    np.testing.assert_allclose(angle, np.arccos((unit(a) * unit(b)).sum(-1)), atol=1e-6)


def test_swing_of_equal_opposite_and_zero_vectors():
    a = np.array([[0.0, 2.0, 0.0], [0.0, -1.0, 0.0], [0.3, -0.2, 0.9], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(swing(a, 3 * a), np.broadcast_to(np.eye(3), (4, 3, 3)), atol=1e-12)
    back = swing(a[:3], -a[:3])
    np.testing.assert_allclose(apply(back, unit(a[:3])), -unit(a[:3]), atol=1e-9)
    np.testing.assert_allclose(back @ back.swapaxes(-1, -2), np.broadcast_to(np.eye(3), (3, 3, 3)), atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), size=st.floats(0.0, 0.08), bend=st.floats(0.1, 1.6))
def test_the_ankle_arrives_and_the_knee_keeps_its_side(seed, size, bend):
    hip, knee, ankle, forward = leg(seed, bend=bend)
    target = ankle + size * unit(np.random.default_rng(seed + 1).normal(size=ankle.shape))
    thigh, shank = bend_leg(hip, knee, ankle, target, forward)
    new_knee = hip + apply(thigh, knee - hip)
    new_ankle = new_knee + apply(shank, ankle - knee)
    reach = STRAIGHT * (UPPER + LOWER)
    reachable = np.linalg.norm(target - hip, axis=-1) <= np.maximum(reach, np.linalg.norm(ankle - hip, axis=-1))
    np.testing.assert_allclose(new_ankle[reachable], target[reachable], atol=1e-7)
    # What is too far is reached for in a straight line.
    np.testing.assert_allclose(unit(new_ankle - hip), unit(target - hip), atol=1e-7)
    # The cosine law, with the inner angle of the knee.
    distance = np.linalg.norm(new_ankle - hip, axis=-1)
    inner = (unit(hip - new_knee) * unit(new_ankle - new_knee)).sum(-1)
    np.testing.assert_allclose(inner, (UPPER**2 + LOWER**2 - distance**2) / (2 * UPPER * LOWER), atol=1e-7)
    bends = np.cross(new_knee - hip, new_ankle - new_knee)
    was = np.cross(knee - hip, ankle - knee)
    assert ((unit(bends) * unit(was)).sum(-1) > 0.5).all()


@pytest.mark.parametrize("bend", [0.0, 0.3])
def test_no_move_is_no_turn(bend):
    hip, knee, ankle, forward = leg(3, bend=bend)
    for turn in bend_leg(hip, knee, ankle, ankle, forward):
        np.testing.assert_allclose(turn, np.broadcast_to(np.eye(3), turn.shape), atol=1e-7)


def test_a_straight_leg_bends_forward():
    hip, knee, ankle, forward = leg(5, bend=0.0)
    target = hip + 0.97 * (ankle - hip)
    thigh, shank = bend_leg(hip, knee, ankle, target, forward)
    new_knee = hip + apply(thigh, knee - hip)
    np.testing.assert_allclose(new_knee + apply(shank, ankle - knee), target, atol=1e-7)
    out = new_knee - hip
    out -= unit(target - hip) * (out * unit(target - hip)).sum(-1, keepdims=True)
    assert ((unit(out) * forward).sum(-1) > 0.999).all() and (np.linalg.norm(out, axis=-1) > 0.05).all()


def test_out_of_reach_and_onto_the_hip():
    hip, knee, ankle, forward = leg(7)
    far = hip + 2 * (ankle - hip)
    near = hip + 0.001 * (ankle - hip)
    for target, distance in ((far, STRAIGHT * (UPPER + LOWER)), (near, (LOWER - UPPER) / STRAIGHT)):
        thigh, shank = bend_leg(hip, knee, ankle, target, forward)
        got = apply(thigh, knee - hip) + apply(shank, ankle - knee)
        np.testing.assert_allclose(np.linalg.norm(got, axis=-1), distance, atol=1e-7)
