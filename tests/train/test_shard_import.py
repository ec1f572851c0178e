"""Imports into a clip store: what comes in, what is refused, killing and resuming, full disks."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kinetok.errors import UserError
from kinetok.train.data import items
from kinetok.train.data.shard_import import import_shards
from kinetok.train.data.shards import ClipStore

pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
MOTIONS, TEXTS, LISTS = "motion_data/vector_272", "texts", "split/version1/t2m_60_300"
ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_the_released_layout_comes_back_bit_by_bit(
    motionmillion: Path, tmp_path: Path, names: list[str], clip_features
) -> None:
    told = []
    report = import_shards(motionmillion, tmp_path / "store", clips=10, progress=lambda *about: told.append(about))
    assert report.splits == {"train": 20, "val": 5} and report.shards == 3 and report.left_out == report.resumed == 0
    assert report.captions == 50 and told[-1][:2] == (24, 25)
    store = ClipStore(tmp_path / "store")
    assert len(store) == 25 and not (tmp_path / "store.importing").exists()
    assert {path.name for path in (tmp_path / "store").iterdir()} == {
        "index.parquet",
        "refused.jsonl",
        "shards",
        "store.json",
    }
    for clip, captions in zip(range(25), store.all_captions(), strict=True):
        name = store.id(clip)
        np.testing.assert_array_equal(store.read(clip), clip_features(name))
        assert store.captions(clip) == captions == [f"a person walks {name}", "a person walks"]
        assert store.splits[clip] == ("train" if names.index(name) % 5 else "val")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three motion files with captions."""
    from kinetok.motion import Motion

    for number in range(3):
        time = np.arange(40)[:, None] / 30
        motion = np.tile(np.eye(3), (40, 22, 1, 1))
        angle = 1.2 + 0.3 * np.sin(3 * time[:, 0] + number)
        motion[:, 16, 0, 0] = motion[:, 16, 1, 1] = np.cos(angle)
        motion[:, 16, 1, 0] = np.sin(angle)
        motion[:, 16, 0, 1] = -np.sin(angle)
        root = np.concatenate((time, 0 * time + 0.9, 0 * time), 1)
        path = tmp_path / "files" / f"{number}.npz"
        path.parent.mkdir(exist_ok=True)
        Motion(rotations=motion, root=root).save(path)
        path.with_suffix(".txt").write_text("a person waves")
    return tmp_path / "files"


def test_the_small_set_and_files_come_in_too(files: Path, tmp_path: Path) -> None:
    from kinetok.train.data.importing import import_motions
    from kinetok.train.data.store import read_clips

    import_motions(files, tmp_path / "set")
    clips = {clip.id: clip for clip in read_clips(tmp_path / "set")}
    import_shards(tmp_path / "set", tmp_path / "from_set")
    import_shards(files, tmp_path / "from_files")
    for name, tolerance in (("from_set", 0), ("from_files", 2e-3)):
        store = ClipStore(tmp_path / name)
        assert len(store) == 3 and set(store.splits) == {"train", "val"}
        for clip in range(3):
            np.testing.assert_allclose(store.read(clip), clips[store.id(clip)].features, atol=tolerance)


def test_bad_lines_of_a_small_set_are_named(files: Path, tmp_path: Path) -> None:
    from kinetok.train.data.importing import import_motions

    import_motions(files, tmp_path / "set")
    lists = tmp_path / "set" / "clips_imported.jsonl"
    good = [json.loads(line) for line in lists.read_text().splitlines()]
    bad: list[dict] = [
        {"id": "long", "kind": "long"},
        {"id": "0"},
        {"id": "none", "trial": "none"},
        {"id": "far", "end": 4000},
        {"id": "short", "end": 20},
        {"id": "empty", "captions": []},
        {"id": "a\ud800b"},
        {"id": "said", "captions": ["a person \ud800"]},
    ]
    lines = [json.dumps(one) for one in good] + [json.dumps({**good[0], **one}) for one in bad] + ["{"]
    lists.write_text("\n".join(lines))
    report = import_shards(tmp_path / "set", tmp_path / "store")
    said = report.refused
    assert sum(report.splits.values()) == 3 and report.left_out == len(said) == 9
    assert "of which the windows are clips" in said["long"] and "got 20" in said["short"]
    assert "printable" in said["a\ud800b"] and "U+D800" in said["clips_imported.jsonl, line 11"]
    for line, says in ((5, "occurs twice"), (6, "no trial"), (7, "a stretch of"), (9, "captions"), (12, "JSON")):
        assert says in said[f"clips_imported.jsonl, line {line}"]
    (tmp_path / "set" / "motions_imported.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"motions_imported\.npz: expected recordings"):
        import_shards(tmp_path / "set", tmp_path / "other")
    (tmp_path / "set" / "motions_imported.npz").unlink()
    (tmp_path / "set" / "motions_imported.npz").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"motions_imported\.npz: expected recordings"):
        import_shards(tmp_path / "set", tmp_path / "another")


def test_what_cannot_be_used_is_named_and_counted(motionmillion: Path, tmp_path: Path, names: list[str]) -> None:
    def npy(number: int) -> Path:
        return motionmillion / MOTIONS / f"{names[number]}.npy"

    def txt(number: int) -> Path:
        return motionmillion / TEXTS / f"{names[number]}.txt"

    npy(1).unlink()
    np.save(npy(2), np.zeros((40, 263), np.float32))
    np.save(npy(3), np.full((40, 272), np.nan, np.float32))
    np.save(npy(4), np.zeros((29, 272), np.float32))
    npy(5).write_bytes(npy(6).read_bytes()[:500])
    txt(7).unlink()
    txt(8).write_bytes(b"a \xff")
    npy(9).write_bytes(b"\x93NUMPY\x01\x00")
    npy(12).unlink()
    os.mkfifo(npy(12))  # which nobody writes to: reading it would wait for ever
    npy(13).unlink()
    npy(13).mkdir()
    huge = npy(14).read_bytes().replace(b"(44, 272), }", b"(99999,272)}")
    npy(14).write_bytes(huge)
    with npy(16).open("r+b") as file:
        file.truncate(2**40)  # a hole
    txt(17).unlink()
    with txt(17).open("wb") as file:
        file.truncate(2**40)
    np.save(npy(18), np.array([[None] * 272] * 40), allow_pickle=True)
    txt(19).write_bytes(b"\n \n")
    npy(21).unlink()
    npy(21).symlink_to(npy(21))
    with (motionmillion / LISTS / "val.txt").open("a") as file:
        file.write(f"{names[11]}\n../../secret\n/etc/passwd\n{'x' * 5000}\na\x1b[31mb\n")
    report = import_shards(motionmillion, tmp_path / "store")
    lines = [json.loads(line) for line in (tmp_path / "store" / "refused.jsonl").read_text().splitlines()]
    said = {one["file"]: one["reason"] for one in lines}
    assert report.left_out == len(said) == 21 == sum(report.reasons.values())
    assert report.refused == dict(list(said.items())[:20])

    def of(number: int) -> str:
        return said[f"{MOTIONS}/{names[number]}.npy"]

    assert "no such file" in of(1) and "[40, 263]" in of(2) and "finite" in of(3) and "got 29" in of(4)
    assert "cannot be read" in of(5) and "no captions" in of(7) and "UTF-8" in of(8) and "cannot be read" in of(9)
    assert "plain file" in of(12) and "directory" in of(13) and "not [99999, 272]" in of(14)
    assert "bytes, got 1099511627776" in of(16) and "bytes, got 1099511627776" in of(17)
    assert "object" in of(18) and "one prompt a line, got none" in of(19) and "symbolic links" in of(21)
    assert "in the lists twice" in of(11) and "name too long" in said[f"{MOTIONS}/{'x' * 5000}.npy"]
    for name in ("'../../secret'", "'/etc/passwd'", r"'a\x1b[31mb'"):
        assert "name of a clip" in said[name]
    assert len(ClipStore(tmp_path / "store")) == 25 - 16  # the clip that is listed twice is there once


@pytest.fixture
def stopping(monkeypatch) -> Iterator[list[int]]:
    """Reading is interrupted at the call whose number is [0]; [1] counts them."""
    plain, at = items.read_features, [0, 0]

    def read(content: bytes) -> np.ndarray:
        at[1] += 1
        if at[1] == at[0]:
            raise KeyboardInterrupt
        return plain(content)

    monkeypatch.setattr(items, "read_features", read)
    yield at


def test_an_interrupted_import_goes_on(
    motionmillion: Path, tmp_path: Path, names: list[str], stopping: list[int]
) -> None:
    (motionmillion / TEXTS / f"{names[7]}.txt").unlink()
    import_shards(motionmillion, tmp_path / "whole", clips=6)
    stopping[:] = [16, 0]
    with pytest.raises(KeyboardInterrupt):
        import_shards(motionmillion, tmp_path / "cut", clips=6)
    assert not (tmp_path / "cut").exists()
    report = import_shards(motionmillion, tmp_path / "cut", clips=6)
    assert report.resumed == 12 and stopping[1] == 16 + 24 - 12
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"MotionMillion", "whole", "cut"}


def test_what_an_import_goes_on_with_is_its_own(motionmillion: Path, tmp_path: Path, stopping: list[int]) -> None:
    stopping[0] = 16
    with pytest.raises(KeyboardInterrupt):
        import_shards(motionmillion, tmp_path / "store", clips=6)
    here = tmp_path / "store.importing"
    before = tree(here)
    with pytest.raises(UserError, match=r"an interrupted import of '.*MotionMillion, 6 clips a shard' is there"):
        import_shards(motionmillion, tmp_path / "store", clips=7)
    shard = here / "store" / "shards" / "shard-000001.tar"
    whole = shard.read_bytes()
    for content in (whole[:-512], None):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(UserError, match=r"shard-000001\.tar is not as it was written there; delete that folder"):
            import_shards(motionmillion, tmp_path / "store", clips=6)
    shard.write_bytes(whole)
    lists = motionmillion / LISTS / "val.txt"
    lists.write_text(lists.read_text().replace("clip.5", "clip.99"))
    with pytest.raises(UserError, match="the data has changed since the import was interrupted"):
        import_shards(motionmillion, tmp_path / "store", clips=6)
    (here / "progress.json").write_text("{")
    with pytest.raises(UserError, match="expected the progress of an import"):
        import_shards(motionmillion, tmp_path / "store", clips=6)
    (here / "progress.json").unlink()
    with pytest.raises(UserError, match="a new folder or an interrupted import, but it holds other files"):
        import_shards(motionmillion, tmp_path / "store", clips=6)
    assert {name for name in before if name != "progress.json"} <= set(tree(here))


def test_a_second_import_at_the_same_time_is_refused(motionmillion: Path, tmp_path: Path) -> None:
    refused = []

    def progress(done: int, of: int, file: str) -> None:
        if done == 5:
            with pytest.raises(UserError, match="another process is importing there") as told:
                import_shards(motionmillion, tmp_path / "store")
            refused.append(told)

    import_shards(motionmillion, tmp_path / "store", progress=progress)
    assert len(refused) == 1 and len(ClipStore(tmp_path / "store")) == 25


def test_killed_imports_end_in_the_same_store(motionmillion: Path, tmp_path: Path, names: list[str], killed) -> None:
    (motionmillion / TEXTS / f"{names[7]}.txt").unlink()
    result = killed("import", tmp_path, 20)
    assert result["killed"] >= 20 and result["points"] > 50 and result["differing"] == []


def test_killed_imports_of_a_small_set_do_too(files: Path, tmp_path: Path, killed) -> None:
    from kinetok.train.data.importing import import_motions

    import_motions(files, tmp_path / "set")
    result = killed("import-set", tmp_path, 8)
    assert result["killed"] >= 8 and result["points"] > 50 and result["differing"] == []


LIMITED = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from kinetok.cli import main
sys.argv[:] = ["kinetok", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("room", [100_000, 3_000])
def test_a_full_disk_leaves_nothing_half_written(motionmillion: Path, tmp_path: Path, room: int) -> None:
    """No file may grow beyond ``room``: the second shard, or already the names of the clips, cannot be written."""
    import_shards(motionmillion, tmp_path / "whole")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    words = ["data", "import", str(motionmillion), "--out", str(tmp_path / "store"), "--shards"]
    failed = subprocess.run([sys.executable, "-c", LIMITED, str(room), *words], capture_output=True, text=True, env=env)
    assert (
        failed.returncode == 2 and failed.stderr.startswith("kinetok: cannot write") and failed.stderr.count("\n") == 1
    )
    assert not (tmp_path / "store").exists()
    report = import_shards(motionmillion, tmp_path / "store")
    assert report.shards == 1 and tree(tmp_path / "store") == tree(tmp_path / "whole")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("no val", r"missing: val\.txt"),
        ("no splits", r"missing: train\.txt, val\.txt"),
        ("empty list", r"val\.txt: expected clips, one a line, but it is empty"),
        ("list bytes", r"train\.txt: expected a list of clips in UTF-8"),
        ("out", "it is there already"),
        ("nothing", "MotionMillion: expected motion with captions, but none of 25 can be used: motion_data"),
        ("no folder", "there is none"),
        ("here", "it is there already"),
    ],
)
def test_bad_input_writes_nothing(motionmillion: Path, tmp_path: Path, names: list[str], harm: str, says: str) -> None:
    source, out = motionmillion, tmp_path / "store"
    if harm == "no val":
        (source / LISTS / "val.txt").unlink()
    elif harm == "no splits":
        for path in (source / LISTS).iterdir():
            path.unlink()
    elif harm == "empty list":
        (source / LISTS / "val.txt").write_text("\n")
    elif harm == "list bytes":
        (source / LISTS / "train.txt").write_bytes(b"a\n\xff\n")
    elif harm == "out":
        out.mkdir()
    elif harm == "here":
        out = Path(".")
    elif harm == "nothing":
        for name in names:
            (source / MOTIONS / f"{name}.npy").unlink()
    else:
        source = source / "none"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says) as told:
        import_shards(source, out)
    assert "\n" not in str(told.value) and sorted(tmp_path.rglob("*")) == before


def test_the_command_line(motionmillion: Path, tmp_path: Path, names: list[str]) -> None:
    from typer.testing import CliRunner

    from kinetok.cli import app

    (motionmillion / TEXTS / f"{names[7]}.txt").unlink()
    source = str(motionmillion)

    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["data", *words])
        return str(result.exception) if isinstance(result.exception, UserError) else result.stdout

    told = said("import", source, "--out", str(tmp_path / "store"), "--shards")
    assert "19 train, 5 val" in told and "left out 1" in told and "1  no captions: expected" in told
    assert "it is there already" in said("import", source, "--out", str(tmp_path / "store"), "--shards")
    report = json.loads(said("import", source, "--out", str(tmp_path / "two"), "--shards", "--json"))
    assert report["clips"] == 24 and list(report["refused"]) == [f"{MOTIONS}/{names[7]}.npy"]
    assert "expected a trained tokenizer" in said(
        "tokens", str(tmp_path / "two"), "--tokenizer", str(tmp_path / "x.pt")
    )
    assert "with its --name" in said("text", str(tmp_path / "two"), "--encoder", "flan-t5")
    assert "expected a clip store" in said("text", str(tmp_path))
