"""Clip stores: the form of the shards, and all kinds of damage."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kinetok.errors import UserError
from kinetok.train.data.checking import check_store
from kinetok.train.data.shard_import import import_shards
from kinetok.train.data.shards import ClipStore

arrow = pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")


@pytest.fixture
def store(motionmillion: Path, tmp_path: Path) -> Path:
    """25 clips in shards of 10."""
    import_shards(motionmillion, tmp_path / "store", clips=10)
    return tmp_path / "store"


def test_a_webdataset_reader_finds_every_clip(store: Path, names: list[str], clip_features) -> None:
    """With nothing but the rules of webdataset: POSIX tars called shard-{000000..000002}.tar; the members of a sample
    follow each other, their key is the name up to its first dot, and what follows is the field."""
    samples: dict[str, dict[str, bytes]] = {}
    for number in range(3):
        last = None
        with tarfile.open(store / f"shards/shard-{number:06d}.tar", "r|") as tar:
            for member in tar:
                assert member.isreg() and not member.pax_headers
                key, _, field = member.name.partition(".")
                assert (key == last) == (key in samples)
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[field] = content.read()
                last = key
    assert len(list((store / "shards").iterdir())) == 3 and len(samples) == len(names)
    for sample in samples.values():
        said = json.loads(sample["json"])
        np.testing.assert_array_equal(np.load(io.BytesIO(sample["npy"])), clip_features(said["id"]))
        assert said["captions"] == [f"a person walks {said['id']}", "a person walks"]
        assert said["split"] == ("train" if names.index(said["id"]) % 5 else "val")


def reseal(store: Path) -> None:
    """store.json names the index that is there, as one who means harm would see to."""
    about = json.loads((store / "store.json").read_text())
    about["index"] = hashlib.sha256((store / "index.parquet").read_bytes()).hexdigest()
    (store / "store.json").write_text(json.dumps(about))


def change_index(store: Path, change: Callable[[list[dict]], object]) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(store / "index.parquet")
    rows = table.to_pylist()
    change(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), store / "index.parquet")
    reseal(store)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("empty shard", "shard-000001.tar is empty"),
        ("cut shard", "shard-000001.tar has 1000 bytes"),
        ("no shard", "shard-000001.tar: No such file"),
        ("other name", "expected a shard called shard-000000.tar or so, got '../../../etc/passwd'"),
        ("cut index", "is another one than store.json names"),
        ("no index", "index.parquet: expected the index of a clip store, but .*No such file"),
        ("no parquet", "expected the index"),
        ("other index", "shard-000000.tar has 10 clips, the index 9 of them"),
        ("no rows", "the index is empty"),
        ("outside", "a clip lies outside of its shard"),
        ("far outside", "a clip lies outside of its shard"),
        ("frames", "a clip has more frames than its bytes hold"),
        ("shard number", "the index names shard 3, there are 3"),
        ("negative shard", "the index names shard -1, there are 3"),
        ("split", "expected the splits train, val, test"),
        ("null", "a row of the index is incomplete"),
        ("about", "expected a clip store"),
        ("deep about", "expected a clip store"),
        ("form", "expected a clip store of the form"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(store: Path, harm: str, says: str) -> None:
    shard, about = store / "shards" / "shard-000001.tar", json.loads((store / "store.json").read_text())
    rows: dict[str, dict] = {
        "outside": {"offset": about["shards"][0]["bytes"] - 100},
        "far outside": {"offset": 2**62, "bytes": 2**62},
        "frames": {"frames": 2**30},
        "shard number": {"shard": 3},
        "negative shard": {"shard": -1},
        "split": {"split": "all"},
        "null": {"offset": None},
    }
    if harm == "empty shard":
        shard.write_bytes(b"")
    elif harm == "cut shard":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif harm == "no shard":
        shard.unlink()
    elif harm == "other name":
        about["shards"][1]["name"] = "../../../etc/passwd"
        (store / "store.json").write_text(json.dumps(about))
    elif harm == "cut index":
        (store / "index.parquet").write_bytes((store / "index.parquet").read_bytes()[:-9])
    elif harm == "no index":
        (store / "index.parquet").unlink()
    elif harm == "no parquet":
        (store / "index.parquet").write_bytes(b"PAR1")
        reseal(store)
    elif harm == "other index":
        change_index(store, lambda rows: rows.pop(0))
    elif harm == "no rows":
        change_index(store, lambda rows: rows.clear())
    elif harm == "about":
        (store / "store.json").write_text("[]")
    elif harm == "deep about":
        (store / "store.json").write_text("[" * 100_000)
    elif harm == "form":
        (store / "store.json").write_text('{"format": "kinetok-clips-1", "shards": []}')
    else:
        change_index(store, lambda all_rows: all_rows[4].update(rows[harm]))
    with pytest.raises(UserError, match=says) as told:
        ClipStore(store)
    assert "\n" not in str(told.value)


def test_a_clip_whose_bytes_have_changed_is_noticed(store: Path) -> None:
    clips = ClipStore(store)
    path = store / "shards" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[int(clips.offset[3]) + 5000] ^= 1
    path.write_bytes(content)
    for call in (lambda: ClipStore(store).read(3), lambda: check_store(ClipStore(store))):
        with pytest.raises(UserError, match=r"000000\.tar.*the bytes have changed.*import the data again") as told:
            call()
        assert str(told.value).count("import the data again") == str(told.value).count(".tar") == 1
    assert len(ClipStore(store).read(4)) > 0


def test_captions_of_the_index_that_are_no_text(store: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(store / "index.parquet")
    bad = pa.array([b"a \xff"] * len(table), pa.binary()).view(pa.string())
    table = table.set_column(table.schema.get_field_index("id"), "id", bad)
    pyarrow.parquet.write_table(table, store / "index.parquet")
    reseal(store)
    with pytest.raises(UserError, match=r"index\.parquet: expected the index.*UTF8"):
        ClipStore(store).id(0)


def member(name: str, content: bytes, **fields: object) -> bytes:
    """A member of a tar: its header and content, in whole blocks."""
    about = tarfile.TarInfo(name)
    about.size = len(content)
    for field, value in fields.items():
        setattr(about, field, value)
    return about.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("/etc/passwd", {}, r"expected the member 000000000\.json, got '/etc/passwd'"),
        ("../../000000000.json", {}, "expected the member"),
        ("000000000.json", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "got a member of type b'2'"),
        ("000000000.json", {"type": tarfile.LNKTYPE, "linkname": "000000001.json"}, "got a member of type b'1'"),
        ("000000000.json", {"type": tarfile.CHRTYPE}, "got a member of type b'3'"),
        ("000000000.json", {"type": tarfile.GNUTYPE_LONGNAME}, "got a member of type b'L'"),
        ("000000000.json", {"size": 8**11 - 1}, r"expected at most \d+ bytes of 000000000\.json, got 8589934591"),
        ("000000000.json", {"size": 0}, "expected JSON in 000000000.json"),
    ],
)
def test_hostile_members_of_a_shard(store: Path, name: str, fields: dict, says: str) -> None:
    check_store(ClipStore(store))
    path = store / "shards" / "shard-000000.tar"
    content = path.read_bytes()
    size = tarfile.TarInfo.frombuf(content[:512], "utf-8", "strict").size
    path.write_bytes(member(name, content[512 : 512 + size], **fields)[:512] + content[512:])
    with pytest.raises(UserError, match=says) as told:
        check_store(ClipStore(store))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("said", "000000012.json says something else than the index"),
        ("header", r"expected the member 000000012\.npy, but"),
        ("moved", r"000000012\.npy is at \d+, the index has it at \d+"),
        ("behind", "there is more in it than its clips"),
        ("nan", "expected finite numbers"),
    ],
)
def test_a_shard_that_says_something_else(store: Path, harm: str, says: str) -> None:
    clips = ClipStore(store)
    path = store / "shards" / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    at = int(clips.offset[12])
    if harm == "said":
        change_index(store, lambda rows: rows[12]["captions"].append("another"))
    elif harm == "header":
        content[at - 512 : at] = bytes(512)
    elif harm == "moved":
        change_index(store, lambda rows: rows[12].update(offset=at + 512))
    elif harm == "behind":
        content[-1] = 1
    else:
        import zlib

        size = int(clips.bytes[12])
        content[at + size - 4 : at + size] = np.float32(np.nan).tobytes()
        checksum = zlib.crc32(content[at : at + size])
        change_index(store, lambda rows: rows[12].update(crc=checksum))
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        check_store(ClipStore(store))


def test_the_command_that_checks(store: Path) -> None:
    from typer.testing import CliRunner

    from kinetok.cli import app

    told = CliRunner().invoke(app, ["data", "check", str(store)])
    assert told.exit_code == 0 and told.stdout == f"{store} is whole  (25 clips in 3 shards)\n"
    shard = store / "shards" / "shard-000002.tar"
    content = bytearray(shard.read_bytes())
    content[9000] ^= 1
    shard.write_bytes(content)
    told = CliRunner().invoke(app, ["data", "check", str(store)])
    assert isinstance(told.exception, UserError) and "shard-000002.tar" in str(told.exception)
