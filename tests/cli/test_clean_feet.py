"""``--clean-feet`` of generate and convert: applied, reported, part of what a resumed run compares."""

import json

import numpy as np

from kinetok.motion import Motion
from kinetok.motion.cleanup import clean_feet

WALK = "a person walks forward"


def test_generate(kinetok, tmp_path):
    command = ("generate", WALK, "-o", tmp_path, "--format", "npz", "--seconds", 2)
    kinetok(*command)
    path = next(tmp_path.glob("*.npz"))
    plain = Motion.load(path)
    expected, report = clean_feet(plain)
    assert report.frames_changed

    made = kinetok(*command, "--clean-feet")
    assert "wrote" in made.out and str(report) in made.out
    np.testing.assert_allclose(Motion.load(path).joints, expected.joints, atol=1e-4)
    (entry,) = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["clips"].values()
    assert entry["feet"]["contacts"] == report.contacts and entry["settings"]["clean_feet"] is True

    again = kinetok(*command, "--clean-feet")
    assert "kept" in again.out and str(report) in again.out
    assert "wrote" in kinetok(*command).out
    np.testing.assert_array_equal(Motion.load(path).joints, plain.joints)


def test_convert(kinetok, tmp_path):
    kinetok("generate", WALK, "-o", tmp_path, "--format", "npz", "--seconds", 2)
    path, target = next(tmp_path.glob("*.npz")), tmp_path / "clean.npz"
    expected, report = clean_feet(Motion.load(path))
    result = kinetok("convert", path, target, "--clean-feet")
    assert result.code == 0 and str(report) in result.out
    np.testing.assert_allclose(Motion.load(target).joints, expected.joints, atol=1e-5)
