"""``kinetok generate``: what it writes, and that an interrupted run goes on where it stopped."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from kinetok.motion import Motion
from kinetok.runtime.scheduler import Scheduler

WALK = "a person walks forward"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_format_and_the_index(kinetok, model, tmp_path):
    result = kinetok(
        "generate", WALK, "a person runs", "--model", model, "-o", tmp_path, "--seconds", "0.4",
        "--format", "bvh,glb,npz", "--format", "png", "--format", "npy",
    )  # fmt: skip
    assert result.code == 0 and result.err == ""
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["clips"]
    assert [clip["prompt"] for clip in index.values()] == [WALK, "a person runs"]
    assert names(tmp_path) == sorted(["index.json", *(name for clip in index.values() for name in clip["files"])])
    assert len(names(tmp_path)) == 1 + 2 * 5
    for clip in index.values():
        assert all(name in result.out for name in clip["files"])
        clips = [Motion.load(tmp_path / name) for name in clip["files"] if not name.endswith(".png")]
        assert {len(motion) for motion in clips} == {clip["frames"]} == {12}
    assert "real-time factor" in result.out and "load" in result.out


def test_json_is_all_that_is_printed(kinetok, model, tmp_path):
    report = json.loads(
        kinetok("generate", WALK, "--model", model, "-o", tmp_path, "--format", "npz", "--seconds", "0.2", "--json").out
    )
    assert report["clips"][0]["prompt"] == WALK and report["real_time_factor"] > 0
    assert set(report["stages_s"]) == {"start", "load", "generate", "write"}


def test_seeds(kinetok, model, tmp_path):
    def joints(folder, *options):
        kinetok(
            "generate", WALK, "--model", model, "-o", tmp_path / folder, "--format", "npz", "--seconds", 1, *options
        )
        return Motion.load(next((tmp_path / folder).glob("*.npz"))).joints

    np.testing.assert_array_equal(joints("a"), joints("b"))
    assert np.abs(joints("a") - joints("c", "--seed", 1)).max() > 1e-3


def test_a_file_of_prompts_is_resumed(kinetok, model, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{WALK}\n\na person runs\na person waves\n", encoding="utf-8")
    out = tmp_path / "out"
    command = ("generate", "--prompts", prompts, "--model", model, "-o", out, "--format", "npz", "--seconds", 0.2)
    save = Motion.save

    def interrupted(self, path, **options):
        if self.text == "a person waves":
            raise KeyboardInterrupt
        save(self, path, **options)

    monkeypatch.setattr(Motion, "save", interrupted)
    stopped = kinetok(*command)
    assert (stopped.code, stopped.err.strip()) == (130, "kinetok: interrupted")
    monkeypatch.setattr(Motion, "save", save)
    assert len(list(out.glob("*.npz"))) == 2
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}

    resumed = kinetok(*command)
    assert resumed.code == 0
    assert (resumed.out.count("kept  "), resumed.out.count("wrote ")) == (2, 1)
    assert len(list(out.glob("*.npz"))) == 3
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())

    lost = next(iter(kept))
    lost.unlink()
    assert kinetok(*command).out.count("wrote ") == 1 and lost.exists()
    assert kinetok(*command).out.count("kept  ") == 3
    assert kinetok(*command, "--seed", 5).out.count("wrote ") == 3


@pytest.mark.parametrize("moment", ["decode", "bvh", "glb", "npz", "png", "json"])
def test_ctrl_c_of_a_long_clip_leaves_whole_files_only(kinetok, model, tmp_path, monkeypatch, moment):
    """In the middle of decoding, or between writing a file and giving it its name."""
    seconds = 14 if moment == "decode" else 1
    command = ("generate", WALK, "a person runs", "--model", model, "-o", tmp_path, "--seconds", seconds)
    formats = ("--format", "bvh,glb,npz,png", "--backend", "torch")
    kinetok(*command[:2], *command[3:], *formats)  # the first sentence is there
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    step, replace = Scheduler.step, Path.replace
    seen = []

    def stepped(self, *args):
        seen.append(1)
        if len(seen) == 180:  # of 210 tokens, behind the first slide of the window
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    def replaced(self, target):
        if self.suffix == f".{moment}":
            signal.raise_signal(signal.SIGINT)
        return replace(self, target)

    if moment == "decode":
        monkeypatch.setattr(Scheduler, "step", stepped)
    else:
        monkeypatch.setattr(Path, "replace", replaced)
    result = kinetok(*command, *formats)
    assert (result.code, result.out, result.err) == (130, "", "kinetok: interrupted\n")
    monkeypatch.undo()
    order = [".bvh", ".glb", ".npz", ".png", ".json"]
    whole = order[: order.index(f".{moment}")] if moment != "decode" else []
    new = [path for path in tmp_path.iterdir() if path not in before]
    assert sorted(path.suffix for path in new) == sorted(whole)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert all(len(Motion.load(path)) == 30 * seconds for path in new if path.suffix != ".png")
    again = kinetok(*command, *formats)
    assert (again.code, again.out.count("kept  "), again.out.count("wrote ")) == (0, 1, 1)


def test_kept_clips_equal_those_of_one_run(kinetok, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    command = ("generate", "--prompts", prompts, "--model", model, "--format", "npz", "--seconds", 0.5, "-o")
    prompts.write_text(f"{WALK}\n", encoding="utf-8")
    kinetok(*command, tmp_path / "parts")
    prompts.write_text(f"{WALK}\n{WALK}\n", encoding="utf-8")
    kinetok(*command, tmp_path / "parts")
    kinetok(*command, tmp_path / "whole")
    parts = [Motion.load(path).joints for path in sorted((tmp_path / "parts").glob("*.npz"))]
    whole = [Motion.load(path).joints for path in sorted((tmp_path / "whole").glob("*.npz"))]
    np.testing.assert_array_equal(parts, whole)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3, "the same line twice is two variants"


@pytest.mark.parametrize("index", ["", "[]", '{"clips": 3}', '{"clips": {"a": 1}}', "\xff"])
def test_a_damaged_index_is_not_overwritten(refused, model, tmp_path, index):
    (tmp_path / "index.json").write_text(index, encoding="latin-1")
    assert "index.json" in refused("generate", WALK, "--model", model, "-o", tmp_path)
    assert (tmp_path / "index.json").read_text(encoding="latin-1") == index
    assert names(tmp_path) == ["index.json"]


def test_fp8_keys_and_values_are_settings_of_their_own(kinetok, model, tmp_path):
    command = ("generate", WALK, "--model", model, "-o", tmp_path / "out", "--format", "npz", "--seconds", 0.2)
    command += ("--backend", "fused")
    assert kinetok(*command).out.count("wrote ") == 1
    made = kinetok(*command, "--kv", "fp8")
    assert made.code == 0 and made.out.count("wrote ") == 1, made
    assert kinetok(*command, "--kv", "fp8").out.count("kept  ") == 1
