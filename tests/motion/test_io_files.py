"""Round trips of every motion file kind, their bad input, and the Khronos validator on our GLB."""

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

TOOLS = Path(__file__).parents[1] / "tools"
PACKAGES = {".bvh": "pybvh", ".glb": "pygltflib"}


def _motion(frames: int = 7, text: str = "a person waves", fps: float = 30.0) -> Motion:
    generator = torch.Generator().manual_seed(frames)
    rotations = matrix_from_6d(torch.randn(frames, 22, 6, generator=generator, dtype=torch.float64))
    root = torch.randn(frames, 3, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 1.0, 0.0])
    return Motion(rotations=rotations.numpy(), root=root.numpy(), fps=fps, text=text)


@pytest.mark.parametrize("frames", [1, 7])
@pytest.mark.parametrize("options", [{}, {"up": "Z"}, {"scale": 100}, {"scale": 100, "up": "Z"}])
def test_bvh_round_trip(tmp_path: Path, frames: int, options: dict) -> None:
    pytest.importorskip("pybvh")
    motion = _motion(frames)
    motion.save(tmp_path / "a.bvh", **options)
    back = Motion.load(tmp_path / "a.bvh")
    np.testing.assert_allclose(back.rotations, motion.rotations, atol=1e-4)
    np.testing.assert_allclose(back.joints, motion.joints, atol=1e-3)


@pytest.mark.parametrize("text", ["a person waves", ""])
@pytest.mark.parametrize("suffix", [".glb", ".npz"])
def test_exact_round_trip(tmp_path: Path, suffix: str, text: str) -> None:
    if suffix == ".glb":
        pytest.importorskip("pygltflib")
    motion = _motion(text=text, fps=60.0)
    motion.save(tmp_path / f"a{suffix}")
    back = Motion.load(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(back.rotations, motion.rotations, atol=1e-6)
    np.testing.assert_allclose(back.joints, motion.joints, atol=1e-5)
    assert (back.fps, back.text) == (60.0, text)


def test_features_file(tmp_path: Path) -> None:
    motion = _motion()
    motion.save(tmp_path / "a.npy")
    np.testing.assert_array_equal(Motion.load(tmp_path / "a.npy").features, motion.features)


@pytest.mark.parametrize("frames", [1, 7])
def test_the_validator_finds_nothing_in_a_glb(tmp_path: Path, frames: int) -> None:
    pytest.importorskip("pygltflib")
    node = shutil.which("node")
    if node is None or not (TOOLS / "node_modules" / "gltf-validator").is_dir():
        pytest.skip("needs node and `npm install --prefix tests/tools`")
    _motion(frames).save(tmp_path / "a.glb")
    command = [node, str(TOOLS / "validate.mjs"), str(tmp_path / "a.glb")]
    issues = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]


@pytest.mark.parametrize("suffix", [".bvh", ".glb", ".npz", ".npy"])
@pytest.mark.parametrize("data", [b"", b"hello", bytes(range(256)), b"glTF\x02\0\0\0", b"PK\x03\x04", b"\x93NUMPY\x01"])
def test_what_is_no_motion_file(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        Motion.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".bvh", ".glb", ".npz", ".npy"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    if suffix in PACKAGES:
        pytest.importorskip(PACKAGES[suffix])
    path = tmp_path / f"a{suffix}"
    _motion().save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError):
        Motion.load(path)


def test_unusable_names_and_options(tmp_path: Path) -> None:
    motion = _motion()
    for action in (
        lambda: motion.save(tmp_path / "a.fbx"),
        lambda: motion.save(tmp_path / "a.glb", scale=2),
        lambda: motion.save(tmp_path / "a.bvh", up="X"),
        lambda: motion.save(tmp_path / "a.bvh", scale=0),
        lambda: Motion.load(tmp_path / "a.fbx"),
        lambda: Motion.load(tmp_path / "missing.bvh"),
    ):
        with pytest.raises(UserError):
            action()
    assert not list(tmp_path.iterdir())


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError):
        Motion.load(tmp_path / "a.npy")
