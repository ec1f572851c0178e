"""Clip stores: import, resuming, what is refused, damage, and the caches beside them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.config import TokenizerConfig
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.train.data import sequences, shard_import
from kinetok.train.data.sequences import Sequences, tokens_name, write_text, write_tokens
from kinetok.train.data.shard_import import import_shards
from kinetok.train.data.shards import ClipStore

pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
MOTIONS, TEXTS, LISTS = "motion_data/vector_272", "texts", "split/version1/t2m_60_300"
NAMES = [f"part{i % 3}/clip.{i}" for i in range(25)]


def features(name: str) -> np.ndarray:
    rng = np.random.default_rng(len(name) + int(name.split(".")[-1]))
    return rng.standard_normal((40 + 2 * (int(name.split(".")[-1]) % 4), 272)).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """MotionMillion's layout with 25 clips, every fifth in val."""
    folder = tmp_path / "MotionMillion"
    for name in NAMES:
        for path, write in (
            (folder / MOTIONS / f"{name}.npy", lambda path, name=name: np.save(path, features(name))),
            (
                folder / TEXTS / f"{name}.txt",
                lambda path, name=name: path.write_text(f"a person walks {name}\n\na person walks\n"),
            ),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
    (folder / LISTS).mkdir(parents=True)
    (folder / LISTS / "train.txt").write_text("\n".join(n for i, n in enumerate(NAMES) if i % 5) + "\n")
    (folder / LISTS / "val.txt").write_text("\n".join(NAMES[::5]) + "\n")
    return folder


def test_the_released_layout_comes_back_bit_by_bit(source: Path, tmp_path: Path) -> None:
    told = []
    report = import_shards(source, tmp_path / "store", clips=10, progress=lambda *about: told.append(about))
    assert report.splits == {"train": 20, "val": 5} and report.shards == 3 and report.left_out == report.resumed == 0
    assert report.captions == 50 and told[-1][:2] == (24, 25)
    store = ClipStore(tmp_path / "store")
    assert len(store) == 25 and not (tmp_path / "store.importing").exists()
    for clip in range(25):
        name = store.id(clip)
        np.testing.assert_array_equal(store.read(clip), features(name))
        assert store.captions(clip) == [f"a person walks {name}", "a person walks"]
        assert store.splits[clip] == ("train" if NAMES.index(name) % 5 else "val")
    with tarfile.open(tmp_path / "store" / "shards" / "000002.tar") as tar:  # as any webdataset reader sees it
        assert tar.getnames()[:2] == ["000000020.json", "000000020.npy"] and len(tar.getnames()) == 10
        member = tar.extractfile("000000020.npy")
        assert member is not None
        np.testing.assert_array_equal(np.load(io.BytesIO(member.read())), store.read(20))


def test_the_small_set_and_files_come_in_too(source: Path, tmp_path: Path) -> None:
    from kinetok.motion import Motion
    from kinetok.train.data.importing import import_motions
    from kinetok.train.data.store import read_clips

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
    import_motions(tmp_path / "files", tmp_path / "set")
    clips = {clip.id: clip for clip in read_clips(tmp_path / "set")}
    import_shards(tmp_path / "set", tmp_path / "from_set")
    import_shards(tmp_path / "files", tmp_path / "from_files")
    for name, tolerance in (("from_set", 0), ("from_files", 2e-3)):
        store = ClipStore(tmp_path / name)
        assert len(store) == 3
        for clip in range(3):
            np.testing.assert_allclose(store.read(clip), clips[store.id(clip)].features, atol=tolerance)


def test_what_cannot_be_used_is_named_and_counted(source: Path, tmp_path: Path) -> None:
    (source / MOTIONS / f"{NAMES[1]}.npy").unlink()
    np.save(source / MOTIONS / f"{NAMES[2]}.npy", np.zeros((40, 263), np.float32))
    np.save(source / MOTIONS / f"{NAMES[3]}.npy", np.full((40, 272), np.nan, np.float32))
    np.save(source / MOTIONS / f"{NAMES[4]}.npy", np.zeros((29, 272), np.float32))
    (source / MOTIONS / f"{NAMES[5]}.npy").write_bytes((source / MOTIONS / f"{NAMES[6]}.npy").read_bytes()[:500])
    (source / TEXTS / f"{NAMES[7]}.txt").unlink()
    (source / TEXTS / f"{NAMES[8]}.txt").write_bytes(b"a \xff")
    (source / MOTIONS / f"{NAMES[9]}.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with (source / LISTS / "val.txt").open("a") as file:
        file.write(f"{NAMES[11]}\n../../secret\n")
    report = import_shards(source, tmp_path / "store")
    lines = [json.loads(line) for line in (tmp_path / "store" / "refused.jsonl").read_text().splitlines()]
    said = {one["file"]: one["reason"] for one in lines}
    assert report.left_out == len(said) == 10 and report.refused == said and sum(report.reasons.values()) == 10

    def of(number: int) -> str:
        return said[f"{MOTIONS}/{NAMES[number]}.npy"]

    assert "no such file" in of(1) and "[40, 263]" in of(2) and "finite" in of(3) and "got 29" in of(4)
    assert "cannot be read" in of(5) and "no captions" in of(7) and "UTF-8" in of(8) and "cannot be read" in of(9)
    assert "in the lists twice" in of(11) and "name of a clip" in said["'../../secret'"]
    assert len(ClipStore(tmp_path / "store")) == 25 - 8  # the clip that is listed twice is there once


def test_an_interrupted_import_goes_on(source: Path, tmp_path: Path, monkeypatch) -> None:
    (source / TEXTS / f"{NAMES[7]}.txt").unlink()
    import_shards(source, tmp_path / "whole", clips=6)
    read, count = shard_import._features, []

    def stops(path: Path) -> np.ndarray:
        count.append(path)
        if len(count) == 16:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(shard_import, "_features", stops)
    with pytest.raises(KeyboardInterrupt):
        import_shards(source, tmp_path / "cut", clips=6)
    assert not (tmp_path / "cut").exists()
    report = import_shards(source, tmp_path / "cut", clips=6)
    assert report.resumed == 12 and len(count) == 16 + 24 - 12
    for name in ("index.parquet", "refused.jsonl", *(f"shards/{n:06d}.tar" for n in range(4))):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (tmp_path / "other.importing").mkdir()
    (tmp_path / "other.importing" / "progress.json").write_text('{"source": "something else"}')
    with pytest.raises(UserError, match="an interrupted import of 'something else'"):
        import_shards(source, tmp_path / "other")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("no val", r"missing: val\.txt"),
        ("empty lists", "they are empty"),
        ("out", "it is there already"),
        ("nothing", "none of 25 can be used"),
        ("no folder", "there is none"),
    ],
)
def test_bad_input_writes_nothing(source: Path, tmp_path: Path, harm: str, says: str) -> None:
    out = tmp_path / "store"
    if harm == "no val":
        (source / LISTS / "val.txt").unlink()
    elif harm == "empty lists":
        for name in ("train", "val"):
            (source / LISTS / f"{name}.txt").write_text("\n")
    elif harm == "out":
        out.mkdir()
    elif harm == "nothing":
        for name in NAMES:
            (source / MOTIONS / f"{name}.npy").unlink()
    else:
        source = source / "none"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says) as told:
        import_shards(source, out)
    assert "\n" not in str(told.value) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("empty shard", "000001.tar is empty"),
        ("cut shard", "000001.tar has 1000 bytes"),
        ("no shard", "000001.tar: No such file"),
        ("no index", "expected the index"),
        ("other index", "has 10 clips, the index 5"),
        ("about", "expected a clip store"),
        ("form", "expected a clip store of the form"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(source: Path, tmp_path: Path, harm: str, says: str) -> None:
    import_shards(source, tmp_path / "store", clips=10)
    store = tmp_path / "store"
    shard = store / "shards" / "000001.tar"
    if harm == "empty shard":
        shard.write_bytes(b"")
    elif harm == "cut shard":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif harm == "no shard":
        shard.unlink()
    elif harm == "no index":
        (store / "index.parquet").write_bytes(b"PAR1")
    elif harm == "other index":
        import_shards(source, tmp_path / "five", clips=5)
        (tmp_path / "five" / "index.parquet").replace(store / "index.parquet")
    elif harm == "about":
        (store / "store.json").write_text("[]")
    else:
        (store / "store.json").write_text('{"format": "x", "shards": []}')
    with pytest.raises(UserError, match=says) as told:
        ClipStore(store)
    assert "\n" not in str(told.value)


def test_a_clip_whose_bytes_are_another_is_noticed(source: Path, tmp_path: Path) -> None:
    import_shards(source, tmp_path / "store")
    store = ClipStore(tmp_path / "store")
    path = tmp_path / "store" / "shards" / "000000.tar"
    content = bytearray(path.read_bytes())
    content[int(store.offset[3]) : int(store.offset[3]) + 6] = b"xxxxxx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="import the data again"):
        ClipStore(tmp_path / "store").read(3)


class Encoder:
    dim, name, calls = 5, "letters", 0

    def encode(self, texts):
        Encoder.calls += len(texts)
        return [torch.full((len(text), 5), float(len(text))) for text in texts]


def test_tokens_and_text_are_made_once(source: Path, tmp_path: Path, monkeypatch) -> None:
    import_shards(source, tmp_path / "store")
    store = ClipStore(tmp_path / "store")
    torch.manual_seed(0)
    tokenizer = MotionTokenizer(TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1)).eval()
    mean, std = torch.zeros(272, dtype=torch.float64), torch.ones(272, dtype=torch.float64)
    (tmp_path / "tokenizer.pt").write_bytes(b"a tokenizer")
    with pytest.raises(UserError, match="kinetok data tokens"):
        Sequences(tmp_path / "store", tokenizer=tmp_path / "tokenizer.pt")
    monkeypatch.setattr(sequences, "BATCH_FRAMES", 200)
    made = write_tokens(store, tmp_path / "tokenizer.pt", tokenizer, mean, std)
    assert made.name == tokens_name(tmp_path / "tokenizer.pt")
    with pytest.raises(UserError, match="kinetok data text"):
        Sequences(tmp_path / "store", tokenizer=tmp_path / "tokenizer.pt")
    monkeypatch.setattr(sequences, "text_encoder", lambda spec: Encoder())
    Encoder.calls = 0
    write_text(store, {"type": "letters"})
    write_text(store, {"type": "letters"})
    assert Encoder.calls == 26  # 25 sentences of their own and one that all share
    with pytest.raises(UserError, match="delete that folder first"):
        write_text(store, {"type": "others"})
    data = Sequences(tmp_path / "store", tokenizer=tmp_path / "tokenizer.pt")
    for clip in (0, 7, 24):
        alone = tokenizer.encode(torch.from_numpy(store.read(clip))[None])[0]
        assert torch.equal(data.tokens(clip), alone.long()) and len(alone) == data.lengths[clip]
        for place, chance in enumerate((0.2, 0.9)):
            row = int(data.caption(np.array([clip]), np.array([chance]))[0])
            text = store.captions(clip)[place]
            assert data.caption_text(row) == text and len(data.text(row)) == data.text_lengths[row] == len(text)
            assert float(data.text(row)[0, 0]) == len(text)
    (made / "tokens.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"tokens\.bin: expected"):
        Sequences(tmp_path / "store", tokenizer=tmp_path / "tokenizer.pt")


def test_encoding_goes_on_where_it_was_interrupted(source: Path, tmp_path: Path, monkeypatch) -> None:
    import_shards(source, tmp_path / "store")
    store = ClipStore(tmp_path / "store")

    class Stops(Encoder):
        def encode(self, texts):
            if Encoder.calls == 9:
                raise KeyboardInterrupt
            return super().encode(texts)

    Encoder.calls = 0
    monkeypatch.setattr(sequences, "text_encoder", lambda spec: Stops())
    with pytest.raises(KeyboardInterrupt):
        write_text(store, {"type": "letters"})
    rows = tmp_path / "store" / "text.writing" / "features.bin"
    rows.write_bytes(rows.read_bytes()[:-3])  # as a crash leaves it
    monkeypatch.setattr(sequences, "text_encoder", lambda spec: Encoder())
    write_text(store, {"type": "letters"})
    assert Encoder.calls == 26 + 1


def test_the_command_line(source: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from kinetok.cli import app

    (source / TEXTS / f"{NAMES[7]}.txt").unlink()

    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["data", *words])
        return str(result.exception) if isinstance(result.exception, UserError) else result.stdout

    told = said("import", str(source), "--out", str(tmp_path / "store"), "--shards")
    assert "19 train, 5 val" in told and "left out 1" in told and "1  no captions: expected" in told
    assert "it is there already" in said("import", str(source), "--out", str(tmp_path / "store"), "--shards")
    report = json.loads(said("import", str(source), "--out", str(tmp_path / "two"), "--shards", "--json"))
    assert report["clips"] == 24 and list(report["refused"]) == [f"{MOTIONS}/{NAMES[7]}.npy"]
    assert "expected a trained tokenizer" in said(
        "tokens", str(tmp_path / "two"), "--tokenizer", str(tmp_path / "x.pt")
    )
    assert "with its --name" in said("text", str(tmp_path / "two"), "--encoder", "flan-t5")
    assert "expected a clip store" in said("text", str(tmp_path))
