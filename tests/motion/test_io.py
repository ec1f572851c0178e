"""Motion files: round trips, other people's figures, the Khronos validator."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.kernels.kinematics import matrix_from_6d
from kinetok.motion import Motion
from kinetok.motion.io.resample import quaternions, resample, rotation_vectors

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared" / "data" / "bvh_samples"
TOOLS = ROOT / "tests" / "tools"
PACKAGES = {"bvh": "pybvh", "glb": "pygltflib", "png": "PIL"}


def needs(*suffixes: str) -> None:
    """Skip where the package that reads and writes one of these is not installed."""
    for suffix in suffixes:
        if suffix in PACKAGES:
            pytest.importorskip(
                PACKAGES[suffix], reason=f"needs {PACKAGES[suffix]} for .{suffix}, of the extra 'files'"
            )


@pytest.fixture(scope="module")
def motion() -> Motion:
    generator = torch.Generator().manual_seed(0)
    rotations = matrix_from_6d(torch.randn(20, 22, 6, generator=generator)).numpy()
    root = torch.randn(20, 3, generator=generator).numpy() + np.array([0, 1, 0])
    return Motion(rotations=rotations, root=root, text="tumbling « ü »")


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("npz", {}),
        ("glb", {}),
        ("bvh", {}),
        ("bvh", {"scale": 100.0}),
        ("bvh", {"up": "Z"}),
        ("bvh", {"scale": 39.3701}),
    ],
)
def test_round_trip(motion: Motion, tmp_path: Path, suffix: str, options: dict) -> None:
    needs(suffix)
    path = tmp_path / f"a.{suffix}"
    motion.save(path, **options)
    again = Motion.load(path)
    np.testing.assert_allclose(again.rotations, motion.rotations, atol=1e-4)
    np.testing.assert_allclose(again.joints, motion.joints, atol=1e-3)
    assert again.fps == pytest.approx(30, abs=1e-3) and len(again) == len(motion)
    assert suffix == "bvh" or again.text == motion.text
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_features_round_trip(motion: Motion, tmp_path: Path) -> None:
    motion.save(tmp_path / "a.npy")
    np.testing.assert_array_equal(Motion.load(tmp_path / "a.npy").features, motion.features)


def test_a_single_frame(motion: Motion, tmp_path: Path) -> None:
    needs("bvh", "glb", "png")
    still = Motion(rotations=motion.rotations[:1], root=motion.root[:1])
    for suffix in ("bvh", "glb", "npz", "png"):
        still.save(tmp_path / f"a.{suffix}")
    assert len(Motion.load(tmp_path / "a.bvh")) == 1


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the sample BVH files are not carried in the repository")
@pytest.mark.parametrize("name", sorted(p.name for p in SAMPLES.glob("*.bvh")))
def test_other_peoples_figures(name: str) -> None:
    needs("bvh")
    motion = Motion.load(SAMPLES / name)
    joints = motion.joints
    assert motion.fps == 30
    assert np.abs(motion.root[0, [0, 2]]).max() < 1e-4
    assert 0.7 < motion.root[0, 1] < 1.2  # the pelvis of a standing adult
    assert (joints[:, 15, 1] > joints[:, 0, 1]).mean() > 0.95  # the head is above the pelvis
    assert -0.1 < joints[..., 1].min() < 0.1
    assert motion.rotations[0, 0, 2, 2] > 0.5  # facing +Z
    toes = joints[:, [10, 11]] - joints[:, [7, 8]]
    forward = motion.rotations[:, 0, :, 2]
    assert ((toes * forward[:, None]).sum(-1) > 0).mean() > 0.6  # feet mostly point where the body faces


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the sample BVH files are not carried in the repository")
def test_a_walk_goes_forward_at_walking_speed() -> None:
    needs("bvh")
    motion = Motion.load(SAMPLES / "cmu_02_01_walk.bvh")
    assert 2.5 < motion.root[-1, 2] - motion.root[0, 2] < 4.5


def test_the_khronos_validator_finds_nothing(motion: Motion, tmp_path: Path) -> None:
    needs("glb")
    node = shutil.which("node")
    if node is None or not (TOOLS / "node_modules" / "gltf-validator").is_dir():
        pytest.skip("gltf-validator is not installed: npm install --prefix tests/tools")
    motion.save(tmp_path / "a.glb")
    run = subprocess.run([node, TOOLS / "validate.mjs", tmp_path / "a.glb"], capture_output=True, text=True, check=True)
    issues = json.loads(run.stdout)
    assert issues["numErrors"] == 0 and issues["numWarnings"] == 0, issues["messages"]


def test_resampling_follows_the_arc() -> None:
    angle = np.linspace(0, 1, 9)
    turn = np.zeros((9, 1, 3, 3))
    turn[:, 0] = [[[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]] for a in angle]
    rotations, root = resample(turn, np.outer(angle, [1, 2, 3]), 120, 30)
    assert len(root) == 3
    np.testing.assert_allclose(rotation_vectors(rotations)[:, 0, 1], [0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(root[:, 0], [0, 0.5, 1], atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(quaternions(rotations), axis=-1), 1)


def test_unknown_kinds_and_options(motion: Motion, tmp_path: Path) -> None:
    for call in (
        lambda: motion.save(tmp_path / "a.fbx"),
        lambda: motion.save(tmp_path / "a"),
        lambda: motion.save(tmp_path / "a.glb", up="Z"),
        lambda: motion.save(tmp_path / "a.bvh", up="X"),
        lambda: motion.save(tmp_path / "a.bvh", scale=-1.0),
        lambda: Motion.load(tmp_path / "a.mp4"),
        lambda: Motion.load(tmp_path / "absent.npz"),
    ):
        with pytest.raises(UserError):
            call()
    assert not list(tmp_path.iterdir())
