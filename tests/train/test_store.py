"""Reading a motion set, mirroring, writing recordings, and everything that is refused."""

import io
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.motion import Motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.train.data.recordings import FAR, Recording, Recordings, write_recordings
from kinetok.train.data.stats import mean_std
from kinetok.train.data.store import mirror_words, read_clips

DATA = Path(__file__).parents[2] / "data" / "cmu"
LINE = {
    "id": "a_1", "trial": "a", "subject": "s", "label": "walk", "kind": "whole", "split": "train", "start": 0,
    "end": 40, "captions": ["a person walks"],
}  # fmt: skip


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recordings and a handful of their clips."""
    folder = tmp_path_factory.mktemp("data")
    lines = (DATA / "clips_cmu.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if json.loads(line)["kind"] != "long"]
    (folder / "clips_cmu.jsonl").write_text("\n".join(wanted[::60]), encoding="utf-8")
    (folder / "motions_cmu.npz").write_bytes((DATA / "motions_cmu.npz").read_bytes())
    return folder


def recording(frames: int = 40, seed: int = 0) -> Recording:
    rng = np.random.default_rng(seed)
    vectors = rng.uniform(-1, 1, (frames, 22, 3)) * (np.pi / np.sqrt(3))
    return Recording(vectors, rng.normal(size=(frames, 3)), np.array(CANONICAL_OFFSETS) * rng.uniform(0.5, 2))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_recordings(tmp_path / "motions_x.npz", [("a", recording()), ("b", recording(33, seed=1))])
    (tmp_path / "clips_x.jsonl").write_text(json.dumps(LINE), encoding="utf-8")
    return tmp_path


def test_clips_are_upright_and_mirror(few: Path) -> None:
    clips = read_clips(few)
    assert len(clips) >= 8 and all(len(c.features) == len(c.mirrored) >= 30 for c in clips)
    for clip in clips[:4]:
        plain, mirrored = Motion.from_features(clip.features), Motion.from_features(clip.mirrored)
        assert plain.joints[:, 15, 1].max() > 0.3
        # The mirrored left wrist is where the right one was, on the other side.
        flipped = plain.joints[:, 21] * [-1, 1, 1]
        np.testing.assert_allclose(mirrored.joints[:, 20], flipped, atol=2e-3)


def test_statistics_are_one_number_a_block(few: Path) -> None:
    mean, std = mean_std(read_clips(few))
    assert mean.shape == std.shape == (272,) and (std > 0).all()
    for block in (slice(0, 2), slice(2, 8), slice(8, 74), slice(74, 140), slice(140, 272)):
        assert len(set(std[block].tolist())) == 1
    assert abs(mean[0]) < 1e-3  # with both sides the mean sideways velocity vanishes


def test_mirrored_words() -> None:
    assert mirror_words("Left, then right: a rightful left") == "Right, then left: a rightful right"
    assert mirror_words("LEFT-handed, leftwards, clockwise") == "RIGHT-handed, rightwards, counterclockwise"
    assert mirror_words("turns Anti-Clockwise on an upright bar") == "turns Clockwise on an upright bar"


@given(st.lists(st.sampled_from(["left", "Right", "LEFT", "clockwise", "Counterclockwise", "leftward", "a", "bright"])))
def test_words_mirrored_twice_are_as_before(words: list[str]) -> None:
    assert mirror_words(mirror_words(" ".join(words))) == " ".join(words)


@given(st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_written_recordings_are_read_back(tmp_path_factory, frames: int, seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "motions_back.npz"
    wanted = {name: recording(frames + i, seed + i) for i, name in enumerate(("b", "a", "other/folder é"))}
    write_recordings(path, list(wanted.items()))
    found = Recordings(path)
    assert found.frames("c") is None
    for name, one in wanted.items():
        assert found.frames(name) == len(one.root)
        back = found.read(name, 0, len(one.root))
        # Half a step of pi/32767, and float32 metres.
        np.testing.assert_allclose(back.vectors, one.vectors, atol=0.51 * np.pi / 32767)
        np.testing.assert_allclose(back.root, one.root, atol=1e-6)
        np.testing.assert_allclose(back.offsets, one.offsets, atol=1e-6)
        np.testing.assert_array_equal(found.read(name, 1, 2).vectors, back.vectors[1:2])


def test_one_recording_at_a_time_is_held_as_it_was_read(tmp_path: Path) -> None:
    before: list[weakref.ref] = []

    def read() -> Iterator[tuple[str, Recording]]:
        for name in "abc":
            assert all(one() is None for one in before[:-1])
            one = recording(seed=ord(name))
            before.append(weakref.ref(one.vectors))
            yield name, one

    write_recordings(tmp_path / "motions_x.npz", read())
    assert list(Recordings(tmp_path / "motions_x.npz").rows) == ["a", "b", "c"]


def test_bodies_are_scaled_to_one_leg_length(small: Path) -> None:
    read = Recordings(small / "motions_x.npz").read("a", 0, 40)
    leg = np.linalg.norm(np.array(CANONICAL_OFFSETS)[[4, 7]], axis=-1).sum()
    own = np.linalg.norm(read.offsets[[4, 7]], axis=-1).sum()
    np.testing.assert_allclose(read.on_canonical_skeleton()[1], read.root * (leg / own), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"captions": None}, "missing: captions"),
        ({"kind": None, "trial": None}, "missing: trial, kind"),
        ({"captions": "a person walks"}, "expected captions to be a list of sentences, got 'a person walks'"),
        ({"captions": []}, "list of sentences"),
        ({"captions": [3]}, "expected a sentence, got int"),
        ({"captions": ["a person \x00 walks"]}, "U\\+0000"),
        ({"captions": ["a \udc80"]}, "U\\+DC80"),
        ({"captions": ["  "]}, "empty prompt"),
        ({"split": "training"}, "expected split to be one of train, val, test, got 'training'"),
        ({"kind": "half"}, "expected kind"),
        ({"id": 7}, "expected id to be text, got 7"),
        ({"label": ["walk"]}, "expected label to be text, got list"),
        ({"start": -1}, "expected start to be a count of frames, got -1"),
        ({"end": 39.5}, "expected end to be a count of frames, got 39.5"),
        ({"end": True}, "got True"),
        ({"heading_flips": "no"}, "heading_flips"),
        ({"end": 41}, "a stretch of the 40 frames of 'a', got start 0 and end 41"),
        ({"start": 40}, "got start 40 and end 40"),
        ({"end": 10**30}, "a stretch of the 40 frames"),
        ({"trial": "c"}, "motions_x.npz has no trial 'c'"),
    ],
)
def test_bad_lines_are_named(small: Path, change: dict, says: str) -> None:
    line = {name: value for name, value in {**LINE, **change}.items() if value is not None}
    text = json.dumps({**LINE, "id": "a_0"}) + "\n" + json.dumps(line) + "\n"
    (small / "clips_x.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says) as refused:
        read_clips(small)
    assert "clips_x.jsonl, line 2: " in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "found none"),
        ("{", "line 1"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 100_000, "line 1: expected a JSON object"),
        (f"{json.dumps(LINE)}\n\n{json.dumps(LINE)}", "line 3: the clip id 'a_1' occurs twice"),
        (json.dumps({**LINE, "end": 20}), "at least 30 frames, found none"),
        ("", "found none"),
        (b"\xff", "UTF-8"),
    ],
)
def test_bad_lists_are_named(small: Path, text: str | bytes | None, says: str) -> None:
    (small / "clips_x.jsonl").unlink()
    if text is not None:
        (small / "clips_x.jsonl").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=says):
        read_clips(small)


def nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[50, 1] = np.nan
    return array


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("rot", lambda x: x[:, :21], r"expected rot to be 16-bit integers \[73, 22, 3\], got int16 \[73, 21, 3\]"),
        ("rot", lambda x: x.reshape(-1, 66), "rot"),
        ("rot", lambda x: x.astype(np.float32), "got float32"),
        ("rot", lambda x: x[:-1], "trans"),
        ("trans", nan, r"within 1000 m, got .*nan.* in row 50 \(b\)"),
        ("trans", lambda x: x + 2 * FAR, "within 1000 m"),
        ("trans", lambda x: x.astype("U9"), "expected trans to be floating-point numbers"),
        ("trans", lambda x: x.astype(object), "cannot be read"),
        ("trial", lambda x: np.array(["a", "a"]), "the trial 'a' occurs twice"),
        ("trial", lambda x: np.array([1, 2]), "expected trial to be text"),
        ("length", lambda x: x + 1, "the trial 'b' .* outside of the 73 rows"),
        ("start", lambda x: x - 1, "the trial 'a'"),
        ("start", lambda x: np.array([2**63 - 1, 0]), "the trial 'a'"),
        ("start", lambda x: x[:1], "start"),
        ("skeleton", lambda x: x + 5, "2 skeletons"),
        ("offsets", lambda x: x * 0, "legs longer than 0"),
        ("offsets", lambda x: x + np.inf, "finite offsets"),
        ("rot", None, "missing: rot"),
    ],
)
def test_bad_arrays_are_named(small: Path, name: str, change, says: str) -> None:
    path = small / "motions_x.npz"
    with np.load(path) as file:
        arrays = dict(file)
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=says) as refused:
        read_clips(small)
    assert "motions_x.npz: " in str(refused.value)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "text", "array", "pickle"])
def test_damaged_recordings_are_named(small: Path, damage: str) -> None:
    path = small / "motions_x.npz"
    whole = path.read_bytes()
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    content = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:400] + bytes(200) + whole[600:],
        "text": b"hello",
        "array": single.getvalue(),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    }
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(UserError, match=r"motions_x.npz: expected recordings in the form of"):
        read_clips(small)
