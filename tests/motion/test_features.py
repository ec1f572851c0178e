"""The 272 features against the authors' numbers and their own inverse."""

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.kernels.kinematics import matrix_from_6d
from kinetok.motion.features import (
    from_motion,
    joints_from_positions,
    joints_from_rotations,
    mirrored,
    rotations_from_features,
)
from kinetok.motion.skeleton import CANONICAL_OFFSETS, LEFT_RIGHT

OFFSETS = np.array(CANONICAL_OFFSETS)
CLIPS = ["case1_0", "case2_0", "case2_1", "synthetic_0", "synthetic_1"]


def moving(frames: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    r = matrix_from_6d(torch.randn(frames, 22, 6, generator=generator, dtype=torch.float64)).numpy()
    return r, torch.randn(frames, 3, generator=generator, dtype=torch.float64).numpy()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("noisy", ["", "_noisy"])
def test_golden_inverse(golden, clip: str, noisy: str) -> None:
    with np.load(golden("motion272.npz")) as z:
        name = clip + noisy
        x = z[f"{name}_x272"].astype(np.float64)
        rotations, root = rotations_from_features(x)
        np.testing.assert_allclose(joints_from_positions(x), z[f"{name}_pos_from_local_positions"], atol=1e-5)
        np.testing.assert_allclose(rotations, z[f"{name}_rotmat_global_root"], atol=1e-5)
        np.testing.assert_allclose(root, z[f"{name}_root_translation"], atol=1e-5)


@pytest.mark.parametrize("clip", CLIPS)
def test_golden_forward(golden, clip: str) -> None:
    with np.load(golden("motion272.npz")) as z:
        offsets = z[f"{clip}_rest_offsets"]
        x = from_motion(z[f"{clip}_rotmat_global_root"], z[f"{clip}_root_translation"], offsets)
        np.testing.assert_allclose(x, z[f"{clip}_forward272"], atol=1e-5)
        joints = joints_from_rotations(z[f"{clip}_x272"].astype(np.float64), offsets)
        np.testing.assert_allclose(joints, z[f"{clip}_pos_from_local_positions"], atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 3, 17])
def test_both_inverse_routes_agree(frames: int) -> None:
    x = from_motion(*moving(frames), OFFSETS)
    np.testing.assert_allclose(joints_from_positions(x), joints_from_rotations(x, OFFSETS), atol=1e-9)
    assert joints_from_positions(x)[..., 1].min() == pytest.approx(0, abs=1e-9)


def test_features_do_not_depend_on_where_the_clip_starts_and_faces() -> None:
    r, root = moving(9)
    turn = np.array([[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]])
    r2 = r.copy()
    r2[:, 0] = turn @ r[:, 0]
    np.testing.assert_allclose(
        from_motion(r2, root @ turn.T + [3, 1, -2], OFFSETS), from_motion(r, root, OFFSETS), atol=1e-9
    )


def test_numpy_in_numpy_out_torch_in_torch_out() -> None:
    r, root = moving(4)
    as_torch = from_motion(
        torch.from_numpy(r).float(), torch.from_numpy(root).float(), torch.from_numpy(OFFSETS).float()
    )
    assert isinstance(as_torch, torch.Tensor) and as_torch.dtype == torch.float32
    as_numpy = from_motion(r, root, OFFSETS)
    assert isinstance(as_numpy, np.ndarray) and as_numpy.dtype == np.float64
    np.testing.assert_allclose(as_torch.numpy(), as_numpy, atol=1e-4)


def test_a_batch_is_its_clips() -> None:
    clips = np.stack([from_motion(*moving(7, seed), OFFSETS) for seed in range(3)])
    for function in (joints_from_positions, lambda x: joints_from_rotations(x, OFFSETS), rotations_from_features):
        together, alone = function(clips), [function(clip) for clip in clips]
        for many, one in (
            zip(together, zip(*alone, strict=True), strict=True) if isinstance(together, tuple) else [(together, alone)]
        ):
            np.testing.assert_allclose(many, np.stack(one), atol=1e-12)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((2, 0, 272)),
        np.zeros((2, 3, 270)),
        np.zeros((0, 272)),
        np.zeros((3, 271)),
        np.full((3, 272), np.nan),
        np.zeros(272),
    ],
)
def test_bad_features_are_refused(x: np.ndarray) -> None:
    with pytest.raises(UserError, match="expected"):
        joints_from_positions(x)


def test_mirrored_features_are_those_of_the_mirrored_motion() -> None:
    r, root = moving(7)
    other = np.arange(22)
    for left, right in LEFT_RIGHT:
        other[[left, right]] = right, left
    mirror = np.diag([-1.0, 1.0, 1.0])
    x = from_motion(r, root, OFFSETS)
    np.testing.assert_allclose(
        mirrored(x), from_motion(mirror @ r[:, other] @ mirror, root @ mirror, OFFSETS), atol=1e-12
    )
    np.testing.assert_array_equal(mirrored(mirrored(x)), x)
