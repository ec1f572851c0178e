"""A clip store: motion in tar shards (webdataset's form) with a Parquet index beside them.

    store.json              what it holds, where it is from, and "shards": [{"name", "bytes", "clips"}]
    index.parquet           a row a clip: id, split, label, captions, frames, flips, shard, offset, bytes
    shards/000000.tar       for clip N: NNNNNNNNN.npy, float32 [T, 272] at 30 frames a second, and NNNNNNNNN.json
    refused.jsonl           {"file", "reason"} of everything that was left out

A shard can be read in order by any webdataset reader; the index says where each clip's bytes are.
"""

import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError, missing_package
from kinetok.files import whole_file
from kinetok.motion.io.npz import DAMAGED

FORMAT = "kinetok-clips-1"
ABOUT, INDEX, SHARDS, REFUSED = "store.json", "index.parquet", "shards", "refused.jsonl"
FEATURES = 272
OPEN_FILES = 64
BLOCK = 512  # a tar file is made of such blocks


def need_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise missing_package("pyarrow", "data", "a clip store") from error
    return pyarrow


def schema() -> Any:
    arrow = need_pyarrow()
    text, count = arrow.string(), arrow.int32()
    kinds = [("id", text), ("split", arrow.dictionary(arrow.int8(), text)), ("label", text)]
    kinds += [("captions", arrow.list_(text)), ("frames", count), ("flips", count), ("shard", count)]
    return arrow.schema([*kinds, ("offset", arrow.int64()), ("bytes", arrow.int64())])


class ShardWriter:
    """One shard being written; ``rows`` is then its part of the index."""

    def __init__(self, path: Path, number: int) -> None:
        self.file = path.open("wb")
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.number = number
        self.rows: list[dict[str, Any]] = []

    def add(self, clip: int, features: NDArray[np.float32], row: Mapping[str, Any]) -> None:
        """A clip's features and what is said of it ({id, split, label, captions, flips})."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(features, dtype=np.float32), allow_pickle=False)
        said = {name: row[name] for name in ("id", "captions", "label", "split")}
        self._member(f"{clip:09d}.json", json.dumps(said, ensure_ascii=False).encode())
        offset = self.tar.offset + BLOCK
        content = buffer.getvalue()
        self._member(f"{clip:09d}.npy", content)
        place = {"shard": self.number, "offset": offset, "bytes": len(content), "frames": len(features)}
        self.rows.append({**row, **place})

    def _member(self, name: str, content: bytes) -> None:
        about = tarfile.TarInfo(name)
        about.size = len(content)
        self.tar.addfile(about, io.BytesIO(content))

    def close(self) -> int:
        """The size of the finished shard in bytes."""
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        size = self.file.tell()
        self.file.close()
        return size


def write_index(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    arrow = need_pyarrow()
    arrow.parquet.write_table(arrow.Table.from_pylist(list(rows), schema=schema()), path)


def join_indices(parts: Sequence[Path], out: Path) -> None:
    """Part after part into one index, of which never more than a part is in memory."""
    arrow = need_pyarrow()
    with whole_file(out) as temporary, arrow.parquet.ParquetWriter(temporary, schema()) as writer:
        for part in parts:
            writer.write_table(arrow.parquet.read_table(part, schema=schema()))


def is_store(folder: str | Path) -> bool:
    return (Path(folder) / ABOUT).is_file()


class ClipStore:
    """Random access to the clips of a store; the index is in memory, the motion is not.

    Raises ``UserError`` where the index and the shards do not agree, a shard is missing or empty, or it is no store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        arrow = need_pyarrow()
        path = self.folder / ABOUT
        try:
            self.about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            form = self.about["format"]
            self.shards = [(str(one["name"]), int(one["bytes"]), int(one["clips"])) for one in self.about["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            detail = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: expected a clip store (kinetok data import --shards), but {detail}") from error
        if form != FORMAT:
            raise UserError(f"{path}: expected a clip store of the form {FORMAT}, got {str(form)[:60]!r}")
        try:
            self.index = arrow.parquet.read_table(self.folder / INDEX)
            self.index = self.index.select(schema().names).cast(schema())
        except (OSError, KeyError, arrow.ArrowException) as error:
            detail = " ".join(str(error).split())[:120]
            raise UserError(f"{self.folder / INDEX}: expected the index of a clip store, but {detail}") from error

        def column(name: str) -> NDArray[np.int64]:
            return self.index.column(name).to_numpy().astype(np.int64)

        self.frames, self.shard, self.offset, self.bytes = map(column, ("frames", "shard", "offset", "bytes"))
        self.splits = np.asarray(self.index.column("split").cast(arrow.string()).to_numpy(zero_copy_only=False), str)
        self._files: OrderedDict[int, io.BufferedReader] = OrderedDict()
        self._check()

    def __len__(self) -> int:
        return len(self.frames)

    def _check(self) -> None:
        def wrong(problem: str) -> UserError:
            return UserError(f"{self.folder}: its index and its shards disagree: {problem}; import the data again")

        if not len(self):
            raise wrong("the index is empty")
        for number, (name, size, clips) in enumerate(self.shards):
            path = self.folder / SHARDS / name
            try:
                got = path.stat().st_size
            except OSError as error:
                raise wrong(f"{name}: {error.strerror}") from error
            if got != size or not clips:
                kind = "is empty" if not got or not clips else f"has {got} bytes, expected {size}"
                raise wrong(f"{name} {kind}")
            here = self.shard == number
            if int(here.sum()) != clips:
                raise wrong(f"{name} has {clips} clips, the index {int(here.sum())} of them")
        sizes = np.array([size for _, size, _ in self.shards])
        known = (self.shard >= 0) & (self.shard < len(sizes))
        if not known.all():
            raise wrong(f"the index names shard {int(self.shard[~known][0])}, there are {len(sizes)}")
        if not ((self.offset >= 0) & (self.bytes > 0) & (self.offset + self.bytes <= sizes[self.shard])).all():
            raise wrong("a clip lies outside of its shard")

    def captions(self, clip: int) -> list[str]:
        return self.index.column("captions")[clip].as_py()

    def id(self, clip: int) -> str:
        return self.index.column("id")[clip].as_py()

    def read(self, clip: int) -> NDArray[np.float32]:
        """The features float32 ``[T, 272]`` of clip number ``clip``. ``UserError`` where its bytes are something else."""
        number, size = int(self.shard[clip]), int(self.bytes[clip])
        content = os.pread(self._file(number).fileno(), size, int(self.offset[clip]))
        frames = int(self.frames[clip])
        try:
            array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            if array.dtype != np.float32 or array.shape != (frames, FEATURES):
                raise ValueError(f"got {array.dtype} {list(array.shape)}")
        except DAMAGED as error:
            raise UserError(
                f"{self.folder / SHARDS / self.shards[number][0]}: expected features [{frames}, {FEATURES}] of the clip "
                f"{self.id(clip)!r}, but {' '.join(str(error).split())[:100]}; import the data again"
            ) from error
        return array

    def _file(self, number: int) -> io.BufferedReader:
        if number not in self._files:
            if len(self._files) == OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[number] = (self.folder / SHARDS / self.shards[number][0]).open("rb")
        self._files.move_to_end(number)
        return self._files[number]

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (self.read(clip) for clip in range(len(self)))
