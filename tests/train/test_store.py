"""Reading the carried motion set, mirroring, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from kinetok.errors import UserError
from kinetok.motion import Motion
from kinetok.train.data.stats import mean_std
from kinetok.train.data.store import mirror_words, read_clips

DATA = Path(__file__).parents[2] / "data" / "cmu"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recordings and a handful of their clips."""
    folder = tmp_path_factory.mktemp("data")
    lines = (DATA / "clips_cmu.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if json.loads(line)["kind"] != "long"]
    (folder / "clips_cmu.jsonl").write_text("\n".join(wanted[::60]), encoding="utf-8")
    (folder / "motions_cmu.npz").write_bytes((DATA / "motions_cmu.npz").read_bytes())
    return folder


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


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (None, "found none"),
        (["{"], "line 1"),
        (["twice", "twice"], "occurs twice"),
    ],
)
def test_bad_folders_are_named(few: Path, tmp_path: Path, lines, says: str) -> None:
    if lines is not None:
        good = (few / "clips_cmu.jsonl").read_text(encoding="utf-8").splitlines()[0]
        (tmp_path / "clips_cmu.jsonl").write_text("\n".join(good if x == "twice" else x for x in lines), "utf-8")
        (tmp_path / "motions_cmu.npz").write_bytes((few / "motions_cmu.npz").read_bytes())
    with pytest.raises(UserError, match=says):
        read_clips(tmp_path)
