"""``kinetok data import`` and what ``kinetok train decoder --init`` refuses."""

import json

import numpy as np
import pytest

from kinetok.motion import Motion
from kinetok.motion.skeleton import JOINT_NAMES

pytest.importorskip("pybvh", reason="the imported files are BVH, and pybvh is not installed")


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    rotations = np.tile(np.eye(3), (40, 22, 1, 1))
    for side, sign in (("left", -1), ("right", 1)):  # arms down: a T-pose would be cut off
        rotations[:, JOINT_NAMES.index(f"{side}_shoulder")] = [[0, -sign, 0], [sign, 0, 0], [0, 0, 1]]
    for name in ("a", "b"):
        Motion(rotations=rotations, root=np.tile([0, 0.9, 0], (40, 1))).save(folder / f"{name}.bvh")
        (folder / f"{name}.txt").write_text("a person stands", encoding="utf-8")
    (folder / "broken.bvh").write_text("HIERARCHY", encoding="utf-8")
    (folder / "broken.txt").write_text("a person stands", encoding="utf-8")
    return folder


def test_import_reports(kinetok, recordings, tmp_path):
    result = kinetok("data", "import", recordings, "--out", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0].endswith("(1 train, 1 val; 2.7 s of motion, 2 captions)")
    assert "left out 1:\n  broken.bvh  expected 'MOTION'" in result.out
    report = json.loads(kinetok("data", "import", recordings, "--out", tmp_path / "out", "--json").out)
    assert (
        report["clips"] == 2
        and report["splits"] == {"train": 1, "val": 1}
        and list(report["refused"]) == ["broken.bvh"]
    )


def test_import_refuses(refused, recordings, tmp_path):
    assert "none can be used: broken.bvh" in refused(
        "data", "import", keep(recordings, "broken"), "-o", tmp_path / "out"
    )
    assert "found none" in refused("data", "import", keep(recordings, "none"), "-o", tmp_path / "out")
    assert "there is none" in refused("data", "import", tmp_path / "nothing", "-o", tmp_path / "out")
    assert "--out" in refused("data", "import", recordings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recordings"]


def keep(folder, stem):
    for path in folder.iterdir():
        if path.stem != stem:
            path.unlink()
    return folder


def test_fine_tuning_refuses(refused, model, recordings, tmp_path):
    def call(*words):
        return refused("train", "decoder", "--out", tmp_path / "run", *words)

    assert "kinetok data import" in call("--init", "default", "--data", recordings)
    assert "minilm" in call("--init", model, "--data", recordings)
    assert "unknown model" in call("--init", "./nothing", "--data", recordings)
    assert "--recipe does not go with --init" in call("--init", "default", "--recipe", "mini")
    assert "--tokenizer does not go with --init" in call("--init", "default", "--tokenizer", "tokenizer.pt")
    assert "--steps goes with --init" in call("--steps", "3")
    assert "--steps" in call("--init", "default", "--steps", "0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [("data",), ("data", "import")])
def test_help_shows_an_example(kinetok, words):
    result = kinetok(*words, "--help")
    assert result.code == 0 and "kinetok data import recordings" in result.out
