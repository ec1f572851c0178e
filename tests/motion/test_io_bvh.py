"""BVH files of other skeletons, and broken ones."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kinetok.errors import UserError
from kinetok.motion import Motion
from kinetok.motion.skeleton import JOINT_NAMES

pytest.importorskip("pybvh")
AT = {name: joint for joint, name in enumerate(JOINT_NAMES)}
CHANNELS = "CHANNELS 3 Zrotation Yrotation Xrotation"
SIDE = ("{s}UpLeg 1 -1 0", "{s}Leg 0 -4 0", "{s}Foot 0 -4 0", "{s}ToeBase 0 -0.2987 1.1485")
ARM = ("{s}Shoulder 1 2 0", "{s}Arm 1 0 0", "{s}ForeArm {arm}", "{s}Hand {arm}")


def _chain(links: list[str], inner: str = "End Site { OFFSET 0 0 1 }") -> str:
    for link in reversed(links):
        name, offset = link.split(" ", 1)
        inner = f"JOINT {name} {{ OFFSET {offset} {CHANNELS} {inner} }}"
    return inner


def _figure(*, arms_down: bool = False, prefix: str = "", frames: int = 9, seconds: float = 1 / 120) -> str:
    """A figure in units of 10 cm, standing still a unit above the floor and facing +X."""
    limbs = []
    for side, sign in (("Left", 1), ("Right", -1)):
        arm = "0 -3 0" if arms_down else f"{3 * sign} 0 0"
        legs = [_mirror(link.format(s=prefix + side), sign) for link in SIDE]
        limbs.append((_chain(legs), _chain([link.format(s=prefix + side, arm=arm) for link in _mirrored(sign)])))
    head = _chain([f"{prefix}Neck 0 2.5 0", f"{prefix}Head 0 1.8499 -0.2361"])
    trunk = f"JOINT {prefix}Spine {{ OFFSET 0 1 0 {CHANNELS} {head} {limbs[0][1]} {limbs[1][1]} }}"
    joints = 20
    row = " ".join(["3 12 5", "0 90 0", *["0 0 0"] * (joints - 1)])
    tree = (
        f"HIERARCHY\nROOT {prefix}Hips {{ OFFSET 0 0 0 CHANNELS 6 Xposition Yposition Zposition "
        f"Zrotation Yrotation Xrotation {limbs[0][0]} {limbs[1][0]} {trunk} }}"
    )
    tree = tree.replace("{", "\n{\n").replace("}", "\n}\n").replace(" OFFSET", "OFFSET")
    for word in ("CHANNELS", "JOINT", "End Site", "OFFSET"):
        tree = tree.replace(f" {word}", f"\n{word}")
    return f"{tree}MOTION\nFrames: {frames}\nFrame Time: {seconds:.7f}\n" + f"{row}\n" * frames


def _mirror(link: str, sign: int) -> str:
    name, x, rest = link.split(" ", 2)
    return f"{name} {sign * float(x):g} {rest}"


def _mirrored(sign: int) -> list[str]:
    return [_mirror(link, sign) if "{arm}" not in link else link for link in ARM]


def _load(tmp_path: Path, text: str) -> Motion:
    path = tmp_path / "a.bvh"
    path.write_text(text)
    return Motion.load(path)


@pytest.mark.parametrize("prefix", ["", "mixamorig:"])
def test_a_foreign_t_pose_becomes_ours(tmp_path: Path, prefix: str) -> None:
    motion = _load(tmp_path, _figure(prefix=prefix))
    assert (len(motion), motion.fps) == (3, 30.0)
    np.testing.assert_allclose(motion.rotations, np.broadcast_to(np.eye(3), motion.rotations.shape), atol=1e-5)
    np.testing.assert_allclose(motion.root[:, [0, 2]], 0, atol=1e-6)
    assert 0 <= motion.joints[..., 1].min() < 0.05


def test_arms_that_hang_at_rest_hang_in_the_motion(tmp_path: Path) -> None:
    joints = _load(tmp_path, _figure(arms_down=True)).joints[0]
    for side in ("left", "right"):
        arm = joints[AT[f"{side}_wrist"]] - joints[AT[f"{side}_shoulder"]]
        np.testing.assert_allclose(arm / np.linalg.norm(arm), [0, -1, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.replace("LeftLeg", "Foo").replace("RightForeArm", "Bar"), "left_knee, right_elbow"),
        (lambda t: t.replace("Frames: 9", "Frames: 0"), "frames"),
        (lambda t: t.replace("Frames: 9", "Frames: 999999999999"), "frames"),
        (lambda t: t.replace("Frames: 9", "Frames: 10"), "truncated"),
        (lambda t: t.replace("3 12 5", "nan 12 5", 1), "NaN"),
        (lambda t: t.replace("3 12 5", "3 twelve 5", 1), "numbers"),
        (lambda t: t[: len(t) // 3], "Frames"),
        (lambda t: t.replace("}", "", 1), "braces"),
        (lambda t: t.replace("{", "{" * 500), "braces"),
        (lambda t: t.replace("Frame Time: 0.0083333", "Frame Time: 0"), "frame time"),
        (lambda t: t.replace("OFFSET 0 -4 0", "OFFSET 0 x 0", 1), "cannot be read"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path: Path, damage: Callable[[str], str], says: str) -> None:
    text = _figure()
    assert damage(text) != text
    started = time.monotonic()
    with pytest.raises(UserError, match=says) as error:
        _load(tmp_path, damage(text))
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 20  # no hang on a count that lies


def test_real_files(tmp_path: Path) -> None:
    folder = Path(__file__).parents[3] / "shared" / "data" / "bvh_samples"
    paths = sorted(folder.glob("*.bvh"))
    if not paths:
        pytest.skip("the sample BVH files are not beside this checkout")
    for path in paths:
        motion = Motion.load(path)
        joints, forward = motion.joints, motion.rotations[0, 0, :, 2]
        assert motion.fps == 30.0
        assert abs(np.arctan2(forward[0], forward[2])) < 1e-3
        np.testing.assert_allclose(motion.root[0, [0, 2]], 0, atol=1e-6)
        assert -0.05 < joints[..., 1].min() < 0.1
        assert (joints[:, AT["head"], 1] - joints[:, AT["pelvis"], 1]).min() > 0.2
        assert joints[0, AT["left_hip"], 0] > joints[0, AT["right_hip"], 0]


def test_a_suffix_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "CLIP.BVH").write_text(_figure(), encoding="utf-8")
    motion = Motion.load(tmp_path / "CLIP.BVH")
    motion.save(tmp_path / "COPY.BVH")
    np.testing.assert_allclose(Motion.load(tmp_path / "COPY.BVH").joints, motion.joints, atol=1e-4)
