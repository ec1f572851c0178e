"""What training makes of clips: headings, turn captions, repeated cycles."""

import numpy as np
import pytest

from kinetok.motion import Motion
from kinetok.motion.features import VELOCITIES, from_motion, joints_from_positions
from kinetok.motion.quality import acceleration_per_frame, travelled
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.train.data.augment import heading, lengthen, liveliness, turn_caption
from kinetok.train.data.store import matrices


def stepping(frames: int, *, turn: float = 0.0, period: int = 30) -> np.ndarray:
    """Features of a figure that swings its legs and walks 1.2 m/s, turning left by ``turn`` radians in all."""
    t = np.arange(frames)
    vectors = np.zeros((frames, 22, 3))
    swing = 0.4 * np.sin(2 * np.pi * t / period)
    vectors[:, 1, 0], vectors[:, 2, 0] = swing, -swing
    angle = np.linspace(0, turn, frames)
    vectors[:, 0, 1] = angle
    step = 0.04 * np.stack((np.sin(angle), np.zeros(frames), np.cos(angle)), 1)
    root = np.cumsum(step, 0) + np.array([0, 0.92, 0])
    return from_motion(matrices(vectors), root, np.array(CANONICAL_OFFSETS)).astype(np.float32)


@pytest.mark.parametrize("turn", [-3.0, -1.0, 0.0, 2.5, 7.0])
def test_heading_is_the_turn_to_the_left(turn: float) -> None:
    assert heading(stepping(90, turn=turn))[-1] == pytest.approx(turn, abs=1e-4)


def test_liveliness_is_a_speed() -> None:
    still = stepping(40)
    still[:, VELOCITIES] = 0
    assert not liveliness(still).any()
    still[:, VELOCITIES] = np.tile([0.1, 0, 0], 22)  # metres a frame
    np.testing.assert_allclose(liveliness(still), 3.0, rtol=1e-6)


def test_turns_are_named_where_somebody_goes_somewhere() -> None:
    rng = np.random.default_rng(0)
    said = {turn_caption("a person walks forward", 1.2, rng) for _ in range(60)}
    assert "a person turns left" in said and all("left" in caption for caption in said if caption)
    assert "right" in (turn_caption("a person walks forward", -1.2, rng) or "")
    for caption, turned in (
        ("a person walks forward", 0.3),
        ("a person dances salsa", 3.0),
        ("a person runs and turns right", -1.5),
    ):
        assert turn_caption(caption, turned, rng) is None


def test_a_cycle_is_repeated_without_a_jump() -> None:
    clip = stepping(50, turn=0.5)
    longer = lengthen(clip, 180)
    assert longer is not None and len(longer) >= 180 and longer.dtype == np.float32
    np.testing.assert_allclose(longer[: len(clip) // 2], clip[: len(clip) // 2], atol=1e-6)
    joints = joints_from_positions(longer)
    assert travelled(joints) == pytest.approx(0.04 * (len(longer) - 1), rel=0.01)  # goes on walking, on a bend
    most = acceleration_per_frame(Motion.from_features(clip).joints, "max").max()
    assert acceleration_per_frame(Motion.from_features(longer).joints, "max").max() < 1.6 * most


def test_velocities_of_a_repeated_clip_are_differences_of_its_positions() -> None:
    longer = lengthen(stepping(50), 120)
    assert longer is not None
    np.testing.assert_allclose(longer[1:, VELOCITIES], np.diff(longer[:, 8:74], axis=0), atol=1e-7)


def test_what_does_not_repeat_is_left_alone() -> None:
    once = stepping(60, period=600)  # the legs only ever open
    once[:, 8:74] += np.linspace(0, 1, 60, dtype=np.float32)[:, None]
    assert lengthen(once, 180) is None
    assert lengthen(stepping(200), 180) is None  # long enough
    assert lengthen(stepping(20), 180) is None  # no two frames half a second apart
