import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.motion import Motion, quality


def noise(frames: int, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, scale, (frames, 22, 3))


@pytest.mark.parametrize("frames", [4, 7, 31])
def test_against_loops(frames):
    x, y, fps = noise(frames), noise(frames, 1), 24.0
    jerks = [
        np.linalg.norm(x[t + 3, j] - 3 * x[t + 2, j] + 3 * x[t + 1, j] - x[t, j]) * fps**3
        for t in range(frames - 3)
        for j in range(22)
    ]
    assert quality.jerk(x, fps) == pytest.approx(np.mean(jerks), rel=1e-12)

    def pose(t, j):
        return x[t, j] - x[t, 0]

    acc = np.array(
        [
            [np.linalg.norm(pose(t + 2, j) - 2 * pose(t + 1, j) + pose(t, j)) for j in range(22)]
            for t in range(frames - 2)
        ]
    )
    assert quality.acceleration(x) == pytest.approx(acc.mean(), rel=1e-12)
    assert quality.acceleration(x, reduce="max") == pytest.approx(acc.max(1).mean(), rel=1e-12)
    assert quality.acceleration(x, fps) == pytest.approx(acc.mean() * fps * fps, rel=1e-12)

    errors = [np.linalg.norm((x[t, j] - x[t, 0]) - (y[t, j] - y[t, 0])) for t in range(frames) for j in range(22)]
    assert quality.mpjpe(x, y) == pytest.approx(np.mean(errors), rel=1e-12)

    above = total = 0.0
    for t in range(frames - 1):
        for j, limit in zip((7, 10, 8, 11), (0.12, 0.06, 0.12, 0.06), strict=True):
            h = max(x[t, j, 1], x[t + 1, j, 1])
            weight = min(1.0, max(0.0, 2 - 2 ** (h / limit)))
            above += weight * np.hypot(x[t + 1, j, 0] - x[t, j, 0], x[t + 1, j, 2] - x[t, j, 2])
            total += weight
    assert quality.foot_skate(x) == pytest.approx(100 * above / total, rel=1e-12)

    depth = [max(0.0, -min(x[t, j, 1] for j in range(22))) * 100 for t in range(frames)]
    assert quality.penetration(x) == pytest.approx(np.mean(depth), rel=1e-12)


def test_contacts_against_a_loop():
    fps, x = 30.0, noise(40, scale=0.006) + np.array([0.0, 0.1, 0.0])
    got = quality.contacts(x, fps)
    for t in range(40):
        a = min(t, 38)
        for i, (j, limit) in enumerate(zip((7, 10, 8, 11), (0.15, 0.10, 0.15, 0.10), strict=True)):
            slow = np.linalg.norm(x[a + 1, j] - x[a, j]) * fps < 0.5
            assert got[t, i] == (slow and x[t, j, 1] < limit)
    assert got.any() and not got.all()


def test_matches_golden_metrics(golden):
    z = np.load(golden("metrics.npz"))
    gt, pred = z["mpjpe_gt"], z["mpjpe_pred"]
    np.testing.assert_allclose(quality.mpjpe_per_frame(gt, pred), z["mpjpe_per_frame"], rtol=1e-5)
    assert quality.mpjpe(gt, pred) == pytest.approx(float(z["mpjpe"]), rel=1e-5)
    for name, x in (("gt", gt), ("pred", pred)):
        for reduce in ("mean", "max"):
            got = quality.acceleration_per_frame(x, reduce)
            np.testing.assert_allclose(got, z[f"acc_{name}_{reduce}_per_frame"], rtol=1e-5)


@settings(deadline=None, max_examples=15)
@given(frames=st.integers(5, 20), seed=st.integers(0, 99), speed=st.floats(-0.1, 0.1))
def test_gliding_pose_is_smooth_and_skates(frames, seed, speed):
    pose = noise(1, seed)
    pose[..., 1] = np.abs(pose[..., 1]) * 0.1
    x = pose + np.arange(frames)[:, None, None] * np.array([speed, 0.0, 0.0])
    assert quality.jerk(x, 30.0) < 1e-8 and quality.acceleration(x) < 1e-12
    assert quality.foot_skate(x) == pytest.approx(100 * abs(speed), abs=1e-9)
    assert quality.mpjpe(x, pose.repeat(frames, 0)) < 1e-12
    assert quality.travelled(x) == pytest.approx(abs(speed) * (frames - 1), abs=1e-9)
    assert quality.penetration(x) == 0.0


@pytest.mark.parametrize("frames", [0, 1, 2, 3, 4])
def test_short_clips_give_numbers(frames):
    x = noise(frames)
    assert quality.contacts(x, 30.0).shape == (frames, 4)
    for value in (
        quality.jerk(x, 30.0),
        quality.acceleration(x),
        quality.foot_skate(x),
        quality.penetration(x),
        quality.mpjpe(x, x),
        quality.travelled(x),
    ):
        assert np.isfinite(value)
    if frames:
        motion = Motion(rotations=np.tile(np.eye(3), (frames, 22, 1, 1)), root=[[0.0, 0.95, 0.0]] * frames)
        assert all(np.isfinite(v) for v in quality.report(motion).values())
        assert motion.contacts.all()


def test_feet_far_above_the_floor_neither_stand_nor_skate():
    x = noise(9) + np.array([0.0, 500.0, 0.0])
    assert quality.foot_skate(x) == 0.0
    assert not quality.contacts(x, 30.0).any()


def test_wrong_shapes_are_named():
    with pytest.raises(UserError, match=r"joints: expected the shape \[T, 22, 3\], got \[5, 21, 3\]"):
        quality.jerk(np.zeros((5, 21, 3)), 30.0)
    with pytest.raises(UserError, match="got 4 and 5 frames"):
        quality.mpjpe(noise(4), noise(5))
    with pytest.raises(UserError, match="expected mean or max"):
        quality.acceleration(noise(4), reduce="sum")  # type: ignore[arg-type]
