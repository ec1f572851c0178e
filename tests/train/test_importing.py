"""Somebody's folder of motion files and captions becomes a motion set; what cannot be used is named."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from kinetok.errors import UserError
from kinetok.motion import Motion
from kinetok.motion.io.resample import quaternions
from kinetok.motion.skeleton import CANONICAL_OFFSETS, JOINT_NAMES, LEFT_RIGHT
from kinetok.train.data.importing import CLIPS, DROPPED, MOTIONS, import_motions
from kinetok.train.data.store import read_clips

pytest.importorskip("pybvh", reason="the imported files are BVH, and pybvh is not installed")
AT = {name: joint for joint, name in enumerate(JOINT_NAMES)}


def about(axis: int, angle: np.ndarray) -> np.ndarray:
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    turn = np.tile(np.eye(3), (len(angle), 1, 1))
    turn[:, i, i], turn[:, i, j], turn[:, j, i], turn[:, j, j] = (
        np.cos(angle),
        -np.sin(angle),
        np.sin(angle),
        np.cos(angle),
    )
    return turn


def wave(frames: int = 45, *, seed: int = 0, fps: float = 30.0, turn: float = 0.02, t_pose: int = 0) -> Motion:
    """Somebody turns slowly to the left and lifts the left arm; the right one hangs."""
    rng = np.random.default_rng(seed)
    time = np.arange(frames) / fps
    rotations = np.tile(np.eye(3), (frames, 22, 1, 1))
    rotations[:, 0] = about(1, turn * 30 * time)
    rotations[:, AT["right_shoulder"]] = about(2, np.full(frames, 1.3))
    rotations[:, AT["left_shoulder"]] = about(2, 0.9 * np.sin(3 * time + rng.uniform(0.5, 1)) - 0.2)
    rotations[:, AT["left_knee"]] = about(0, 0.3 + 0.2 * np.sin(5 * time))
    rotations[:t_pose] = np.eye(3)
    root = np.stack([0.3 * time, np.full(frames, 0.95), time], axis=-1)
    return Motion(rotations=rotations, root=root, offsets=CANONICAL_OFFSETS, fps=fps)


def write(folder: Path, name: str, captions: str | bytes | None, motion: Motion | None = None) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (motion or wave(seed=len(name))).save(path)
    if captions is not None:
        path.with_suffix(".txt").write_bytes(captions if isinstance(captions, bytes) else captions.encode())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    write(folder, "wave.bvh", "a person lifts the left arm\n\n  someone waves  \n")
    write(folder, "kicks/front.bvh", "a person kicks")
    write(folder, "kicks/high/turn.BVH", "eine Person dreht sich, naïvely ✓\n")
    return folder


def test_clips_captions_labels_and_motion(source: Path, tmp_path: Path) -> None:
    told = []
    report = import_motions(source, tmp_path / "out", progress=lambda *about: told.append(about))
    assert [about[0] for about in told] == [0, 1, 2] and {about[1] for about in told} == {3}
    assert report.refused == {} and report.captions == 4 and report.seconds == 4.5 and report.flipped == 0
    assert sum(report.splits.values()) == 3 and report.splits["val"] >= 1 and report.splits["train"] >= 1
    clips = {clip.id: clip for clip in read_clips(tmp_path / "out")}
    assert list(clips) == ["kicks/front", "kicks/high/turn", "wave"]
    assert clips["wave"].captions == ("a person lifts the left arm", "someone waves")
    assert clips["kicks/high/turn"].captions == ("eine Person dreht sich, naïvely ✓",)
    assert [clip.label for clip in clips.values()] == ["kicks", "kicks/high", ""]
    # A BVH file has six decimals of a degree, and the set stores steps of 0.006 degrees.
    np.testing.assert_allclose(clips["wave"].features, wave(seed=len("wave.bvh")).features, atol=2e-3)


def test_a_mirrored_recording_is_the_mirrored_clip(source: Path, tmp_path: Path) -> None:
    motion = wave(seed=len("wave.bvh"))
    other = np.arange(22)
    for left, right in LEFT_RIGHT:
        other[[left, right]] = right, left
    flip = np.diag([-1.0, 1.0, 1.0])
    rotations = flip @ motion.rotations[:, other].astype(np.float64) @ flip
    write(source, "evaw.bvh", "a person lifts the right arm", Motion(rotations=rotations, root=motion.root @ flip))
    import_motions(source, tmp_path / "out")
    clips = {clip.id: clip for clip in read_clips(tmp_path / "out")}
    np.testing.assert_allclose(clips["evaw"].features, clips["wave"].mirrored, atol=2e-3)
    np.testing.assert_allclose(clips["evaw"].mirrored, clips["wave"].features, atol=2e-3)


def test_other_kinds_and_frame_rates(tmp_path: Path) -> None:
    write(tmp_path / "in", "slow.npz", "a person waves", wave(90, fps=60, turn=0.02))
    write(tmp_path / "in", "features.npy", "a person waves", wave(60))
    report = import_motions(tmp_path / "in", tmp_path / "out")
    clips = {clip.id: clip for clip in read_clips(tmp_path / "out")}
    assert report.refused == {} and len(clips["slow"].features) == 45 and len(clips["features"].features) == 60
    np.testing.assert_allclose(clips["features"].features, wave(60).features, atol=2e-3)


def test_the_released_layout(tmp_path: Path) -> None:
    for name in ("a/1", "a/2", "b/3", "b/4"):
        path = tmp_path / "in" / "motion_data" / "vector_272" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave(40).save(path)
        text = tmp_path / "in" / "texts" / f"{name}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"a person waves {name}\n", encoding="utf-8")
    lists = tmp_path / "in" / "split" / "version1" / "t2m_60_300"
    lists.mkdir(parents=True)
    for split, names in (("train", "a/1\nb/3\n"), ("val", "a/2\n"), ("all", "a/1\na/2\nb/3\n")):
        (lists / f"{split}.txt").write_text(names, encoding="utf-8")
    report = import_motions(tmp_path / "in", tmp_path / "out")
    assert report.refused == {"motion_data/vector_272/b/4.npy": "in none of the lists in split"}
    assert {c.id: c.split for c in read_clips(tmp_path / "out")} == {"a/1": "train", "a/2": "val", "b/3": "train"}


def test_a_table_of_captions(source: Path, tmp_path: Path) -> None:
    (source / "captions.csv").write_text(
        "\ufefffile,caption,split,label,other\n"
        'wave.bvh,"a person, quickly, waves",test,waving,x\n'
        "wave.bvh,someone waves,test,,\n"
        "kicks/front.bvh,a person kicks,,,\n"
        "kicks\\high\\turn.BVH,a person turns,train\n"
        "nothing.bvh,a person waves,,,\n",
        encoding="utf-8",
    )
    report = import_motions(source, tmp_path / "out")
    clips = {clip.id: clip for clip in read_clips(tmp_path / "out")}
    assert clips["wave"].captions == ("a person, quickly, waves", "someone waves")
    assert (clips["wave"].split, clips["wave"].label) == ("test", "waving")
    assert clips["kicks/high/turn"].split == "train" and clips["kicks/front"].label == "kicks"
    assert clips["kicks/front"].split == "val"  # undecided ones see to it that validation is not empty
    assert report.refused == {"captions.csv, line 6": "no motion file 'nothing.bvh' in the folder"}


@pytest.mark.parametrize(
    ("row", "file", "says"),
    [
        ("wave.bvh,,train", "wave.bvh", "line 2: expected a sentence"),
        ("wave.bvh,a person\x07 waves,", "wave.bvh", "U\\+0007"),
        (
            "wave.bvh,a person waves,training",
            "wave.bvh",
            "expected split to be one of train, val, test, got 'training'",
        ),
        ("wave.bvh,a,train\nwave.bvh,b,val", "wave.bvh", "its rows differ in split: train, val"),
        ("../wave.bvh,a person waves,", "captions.csv, line 2", "no motion file '../wave.bvh'"),
        ("wave.bvh,a person waves,", "kicks/front.bvh", "no row of captions.csv names it"),
    ],
)
def test_bad_rows_are_reported(source: Path, tmp_path: Path, row: str, file: str, says: str) -> None:
    good = "" if file == "kicks/front.bvh" else "\nkicks/front.bvh,a person kicks,"
    (source / "captions.csv").write_text(f"file,caption,split\n{row}{good}\n", encoding="utf-8")
    report = import_motions(source, tmp_path / "out")
    with pytest.raises(UserError, match=says):
        raise UserError(report.refused[file])
    assert len(read_clips(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("name", "captions", "motion", "says"),
    [
        ("bad.bvh", "a person waves", b"HIERARCHY\nnothing", "expected 'MOTION'"),
        ("bad.npy", "a person waves", np.zeros((40, 263), np.float32), r"features \[T, 272\], got float32 \[40, 263\]"),
        ("bad.npy", "a person waves", np.full((40, 272), np.nan, np.float32), "finite numbers"),
        ("bad.npy", "a person waves", np.array([["x"] * 272] * 40), "features"),
        ("bad.npy", "a person waves", np.array([[None] * 272] * 40), "cannot be read"),
        ("bad.bvh", "a person \x1b[31m waves", wave(), "bad.txt, line 1: .*U\\+001B"),
        ("bad.bvh", b"a person \xff waves", wave(), "UTF-8"),
        ("bad.bvh", " \n\n", wave(), "one prompt a line, got none"),
        ("bad.bvh", None, wave(), "no captions: expected bad.txt"),
        ("bad.bvh", "a person waves", wave(29), "at least 30 frames at 30 a second, got 29$"),
        ("bad.bvh", "a person waves", wave(60, t_pose=30), r"got 20 \(40 frames of T-pose are cut off\)"),
        ("wave.npz", "a person waves", wave(), "wave.bvh is there too"),
    ],
)
def test_bad_files_are_reported_and_the_rest_imported(
    source: Path, tmp_path: Path, name, captions, motion, says
) -> None:
    write(source, name, captions, motion if isinstance(motion, Motion) else None)
    if isinstance(motion, bytes):
        (source / name).write_bytes(motion)
    elif isinstance(motion, np.ndarray):
        np.save(source / name, motion)
    report = import_motions(source, tmp_path / "out")
    assert list(report.refused) == [name]
    with pytest.raises(UserError, match=says) as told:
        raise UserError(report.refused[name])
    assert "\n" not in str(told.value)
    assert json.loads((tmp_path / "out" / DROPPED).read_text("utf-8"))[0]["trial"] == name
    assert len(read_clips(tmp_path / "out")) == 3


def test_motions_that_are_none(source: Path, tmp_path: Path) -> None:
    motion = wave()
    for name, change in (
        ("sheared", {"rotations": motion.rotations * 2}),
        ("zero", {"rotations": motion.rotations * 0}),
        ("far", {"root": motion.root + 2e3}),
        ("small", {"offsets": np.zeros((22, 3))}),
    ):
        arrays = {"rotations": motion.rotations, "root": motion.root, "offsets": np.array(CANONICAL_OFFSETS), **change}
        np.savez(source / f"{name}.npz", fps=30.0, **arrays)
        (source / f"{name}.txt").write_text("a person waves", encoding="utf-8")
    refused = import_motions(source, tmp_path / "out").refused
    assert "rotation matrices" in refused["sheared.npz"] and "rotation matrices" in refused["zero.npz"]
    assert "unit of length" in refused["far.npz"] and "legs" in refused["small.npz"]


def test_captions_without_motion_and_hidden_files(source: Path, tmp_path: Path) -> None:
    (source / "alone.txt").write_text("a person waves", encoding="utf-8")
    (source / "._wave.bvh").write_bytes(b"\0\5\26\7")
    (source / ".git").mkdir()
    (source / ".git" / "x.bvh").write_text("x", encoding="utf-8")
    assert import_motions(source, tmp_path / "out").refused == {
        "alone.txt": "captions without a motion file of the same name"
    }


def test_heading_flips_are_counted(tmp_path: Path) -> None:
    motion = wave()
    rotations = motion.rotations.astype(np.float64)
    rotations[:, 0] = about(0, np.linspace(0, 2 * np.pi, len(motion)))  # a roll: upside down in the middle
    assert np.isfinite(quaternions(rotations)).all()
    write(tmp_path / "in", "roll.bvh", "a person rolls", Motion(rotations=rotations, root=motion.root))
    write(tmp_path / "in", "wave.bvh", "a person waves")
    report = import_motions(tmp_path / "in", tmp_path / "out")
    assert report.flipped == 1
    assert {clip.id: clip.heading_flips for clip in read_clips(tmp_path / "out")} == {"roll": 2, "wave": 0}


def test_splits_are_stable_and_have_validation_clips(tmp_path: Path) -> None:
    motion = wave(31)
    for i in range(30):
        write(tmp_path / "in", f"{i}.npz", "a person waves", motion)
    import_motions(tmp_path / "in", tmp_path / "out")
    first = {clip.id: clip.split for clip in read_clips(tmp_path / "out")}
    assert 1 <= list(first.values()).count("val") <= 8
    for i in range(30, 34):
        write(tmp_path / "in", f"{i}.npz", "a person waves", motion)
    import_motions(tmp_path / "in", tmp_path / "out")
    again = {clip.id: clip.split for clip in read_clips(tmp_path / "out")}
    assert {name: again[name] for name in first} == first


def test_lists_of_splits(source: Path, tmp_path: Path) -> None:
    (source / "split").mkdir()
    (source / "split" / "train.txt").write_text("wave\nkicks/front\n", encoding="utf-8")
    (source / "split" / "test.txt").write_text("kicks/high/turn\n", encoding="utf-8")
    assert import_motions(source, tmp_path / "out").splits == {"train": 2, "test": 1}
    (source / "split" / "val.txt").write_text("wave\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"'wave' is in train.txt and in val.txt"):
        import_motions(source, tmp_path / "out")


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("no folder", "expected a folder of motion files"),
        ("empty", "expected motion files"),
        ("set", "it is a motion set already; train on it with --data"),
        ("no captions", "none can be used: kicks/front.bvh: no captions"),
        ("columns", "the columns file and caption, separated by commas, got 'file;caption'"),
        ("table bytes", "expected a UTF-8 table"),
        ("table quotes", "expected a UTF-8 table"),
        ("out", "an earlier import, but it holds other files"),
        ("out file", "an earlier import"),
    ],
)
def test_nothing_is_written_when_nothing_can_be(source: Path, tmp_path: Path, damage: str, says: str) -> None:
    out = tmp_path / "out"
    if damage == "no folder":
        source = source / "none"
    elif damage == "empty":
        source = tmp_path / "empty"
        source.mkdir()
    elif damage == "set":
        (source / "clips_mine.jsonl").write_bytes(b"")
    elif damage == "no captions":
        for path in source.rglob("*.txt"):
            path.unlink()
    elif damage == "out":
        out.mkdir()
        (out / MOTIONS).write_bytes(b"")
        (out / "mine.txt").write_bytes(b"mine")
    elif damage == "out file":
        out.write_bytes(b"mine")
    else:
        content = {
            "columns": b"file;caption\n",
            "table bytes": b"file,caption\n\xff,x\n",
            "table quotes": b'file,caption\n"',
        }
        (source / "captions.csv").write_bytes(content[damage])
    before = tree(tmp_path)
    with pytest.raises(UserError, match=says) as refused:
        import_motions(source, out)
    assert "\n" not in str(refused.value) and tree(tmp_path) == before


def test_an_earlier_import_is_replaced_and_survives_a_failure(source: Path, tmp_path: Path) -> None:
    out = source / "imported"  # its own .npz files do not count as motion
    import_motions(source, out)
    assert {path.name for path in out.iterdir()} == {MOTIONS, CLIPS, DROPPED}
    whole = tree(out)
    import_motions(source, out)
    assert list(tree(out)) == list(whole)
    for path in source.glob("**/*.txt"):
        path.unlink()
    before = tree(out)
    with pytest.raises(UserError, match="none can be used"):
        import_motions(source, out)
    assert tree(out) == before


@pytest.mark.parametrize("call", ["kinetok.files.tempfile.mkstemp", "pathlib.Path.replace", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_the_earlier_import(source: Path, tmp_path: Path, monkeypatch, call: str) -> None:
    import_motions(source, tmp_path / "out")
    before = tree(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            import_motions(source, tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_set_that_is_too_large_for_memory_is_said_and_not_written(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kinetok.train.data.importing.MOST_FRAMES", 60)
    with pytest.raises(UserError, match=r"expected at most \d+ hours of motion, .*: import it with --shards"):
        import_motions(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["recordings"]
