"""``kinetok evaluate``: what it refuses, in one line and before it writes."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.train.data.recordings import Recording, write_recordings
from kinetok.train.data.store import Entry


@pytest.fixture
def data(tmp_path: Path):
    """Write a set of one training clip with these changes to its line and to its arrays."""

    def make(more: tuple[dict, ...] = (), **changes) -> Path:
        folder = tmp_path / "data"
        folder.mkdir()
        vectors = np.zeros((40, 22, 3))
        vectors[:, [16, 17]] += [[0, 0, -1.2], [0, 0, 1.2]]
        recording = Recording(vectors, np.tile([0, 0.9, 0], (40, 1)), np.array(CANONICAL_OFFSETS))
        write_recordings(folder / "motions_x.npz", [("a", recording)])
        with np.load(folder / "motions_x.npz") as z:
            arrays = {**z, **changes}
        np.savez(folder / "motions_x.npz", **arrays)
        line = asdict(
            Entry(id="a", trial="a", kind="whole", split="train", start=0, end=40, captions=("a person stands",),
                  subject="", label="")
        )  # fmt: skip
        lines = [json.dumps({**line, **change}) for change in ({}, *more)]
        (folder / "clips_x.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return folder

    return make


def run(refused, model, data: Path) -> str:
    here = data.parent
    out, page = here / "results.json", here / "page.md"
    words = refused("evaluate", "default", "--quick", "--model", model, "--data", data, "--out", out, "--page", page,
                    "--work", here / "work")  # fmt: skip
    assert [path.name for path in here.iterdir()] == ["data"]
    return words


def test_sets_that_cannot_be_evaluated(refused, model, data) -> None:
    assert "split 'test', found none; there are ['train']" in run(refused, model, data())


@pytest.mark.parametrize(
    ("more", "changes", "expected"),
    [
        (({"id": "b", "trial": "z"},), {}, "line 2: motions_x.npz has no trial 'z'"),
        (({},), {}, "line 2: the clip id 'a' occurs twice"),
        (({"id": "b", "captions": []},), {}, "line 2: expected captions"),
        ((), {"rot": np.zeros((40, 21, 3), np.int16)}, "motions_x.npz"),
        ((), {"trans": np.full((40, 3), np.nan, np.float32)}, "motions_x.npz"),
    ],
)
def test_data_that_is_broken(refused, model, data, more, changes, expected) -> None:
    assert expected in run(refused, model, data(more, **changes))


def test_results_of_another_version_stay(refused, model, tmp_path) -> None:
    out = tmp_path / "results.json"
    out.write_text('{"format": "kinetok-evaluation", "version": 99}')
    line = refused("evaluate", "default", "--quick", "--model", model, "--out", out, "--page", tmp_path / "page.md")
    assert "version 1, got 'kinetok-evaluation' version '99'; nothing was overwritten" in line
    assert "version '99'" in refused("evaluate", "page", out, "--page", tmp_path / "page.md")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"] and "99" in out.read_text()
    assert "cannot read" in refused("evaluate", "page", tmp_path / "none.json")
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    assert "expected an earlier page" in refused(
        "evaluate", "default", "--quick", "--model", model, "--out", tmp_path / "x", "--page", notes
    )
    assert notes.read_text() == "mine"
    missing = refused(
        "evaluate", "default", "--quick", "--model", model, "--evaluator", tmp_path, "--out", tmp_path / "x"
    )
    assert "expected an evaluator" in missing
