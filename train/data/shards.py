"""A clip store: motion in tar shards (webdataset's form) with a Parquet index beside them.

    store.json              what it holds, where it is from, the sha256 of the index, "shards": [{"name", "bytes", "clips"}]
    index.parquet           a row a clip: id, split, label, captions, frames, flips, shard, offset, bytes, crc
    shards/shard-000000.tar for clip N: NNNNNNNNN.json, what is said of it, and NNNNNNNNN.npy, float32 [T, 272] at 30 frames
                            a second; crc is the CRC-32 of the latter
    refused.jsonl           {"file", "reason"} of everything that was left out

A shard is a plain POSIX tar, which any webdataset reader takes in order (shards/shard-{000000..000199}.tar); the index says
where each clip's bytes are.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError, missing_package
from kinetok.files import whole_file
from kinetok.train.data.arrays import FEATURES, read_features
from kinetok.train.data.store import SPLITS

FORMAT = "kinetok-clips-2"
ABOUT, INDEX, SHARDS, REFUSED = "store.json", "index.parquet", "shards", "refused.jsonl"
SHARD_NAME = re.compile(r"shard-\d{6}\.tar")
NUMBERS = ("frames", "shard", "offset", "bytes", "crc")
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
    return arrow.schema([*kinds, ("offset", arrow.int64()), ("bytes", arrow.int64()), ("crc", arrow.uint32())])


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """One shard being written; ``rows`` is then its part of the index."""

    def __init__(self, folder: Path, number: int) -> None:
        self.file = (folder / shard_name(number)).open("wb")
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
        self.rows.append({**row, **place, "crc": zlib.crc32(content)})

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


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_store(folder: str | Path) -> bool:
    return (Path(folder) / ABOUT).is_file()


class ClipStore:
    """Random access to the clips of a store. In memory are 60 bytes a clip; motion, ids and captions stay on the disk.

    ``frames``, ``shard``, ``offset``, ``bytes``, ``crc`` int64 ``[clips]``, ``splits`` ``[clips]``; ``digest`` is what
    its contents are. Raises ``UserError`` where the index and the shards do not agree, a shard is missing or empty, or it
    is no store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        arrow = need_pyarrow()
        self._read_about()
        path = self.folder / INDEX
        try:
            if file_digest(path) != self.digest:
                raise self._wrong(f"{INDEX} is another one than {ABOUT} names")
            self._parquet = arrow.parquet.ParquetFile(path)
            table = self._parquet.read(columns=["split", *NUMBERS])
            if any(column.null_count for column in table.columns):
                raise self._wrong("a row of the index is incomplete")
            columns = [table.column(name).to_numpy().astype(np.int64) for name in NUMBERS]
            splits = table.column("split").cast(arrow.string()).to_numpy(zero_copy_only=False)
        except (OSError, KeyError, TypeError, ValueError, arrow.ArrowException) as error:
            if isinstance(error, UserError):
                raise
            detail = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: expected the index of a clip store, but {detail}") from error
        self.frames, self.shard, self.offset, self.bytes, self.crc = columns
        self.splits = np.asarray(splits, str)
        groups = [self._parquet.metadata.row_group(at).num_rows for at in range(self._parquet.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        self._said: tuple[int, list[dict[str, Any]]] | None = None
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()  # workers share the open files
        self._check()

    def __len__(self) -> int:
        return len(self.frames)

    def _read_about(self) -> None:
        path = self.folder / ABOUT
        try:
            self.about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            form = self.about["format"]
            if form != FORMAT:
                raise UserError(f"{path}: expected a clip store of the form {FORMAT}, got {str(form)[:60]!r}")
            self.shards = [(str(one["name"]), int(one["bytes"]), int(one["clips"])) for one in self.about["shards"]]
            self.digest = str(self.about["index"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            detail = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: expected a clip store (kinetok data import --shards), but {detail}") from error

    def _wrong(self, problem: str) -> UserError:
        return UserError(f"{self.folder}: its index and its shards disagree: {problem}; import the data again")

    def _check(self) -> None:
        if not len(self):
            raise self._wrong("the index is empty")
        known = (self.shard >= 0) & (self.shard < len(self.shards))
        if not known.all():
            raise self._wrong(f"the index names shard {int(self.shard[~known][0])}, there are {len(self.shards)}")
        counts = np.bincount(self.shard, minlength=len(self.shards))
        for (name, size, clips), here in zip(self.shards, counts.tolist(), strict=True):
            if not SHARD_NAME.fullmatch(name):
                raise self._wrong(f"expected a shard called {shard_name(0)} or so, got {name[:60]!r}")
            try:
                got = (self.folder / SHARDS / name).stat().st_size
            except OSError as error:
                raise self._wrong(f"{name}: {error.strerror}") from error
            if got != size or not clips:
                kind = "is empty" if not got or not clips else f"has {got} bytes, expected {size}"
                raise self._wrong(f"{name} {kind}")
            if here != clips:
                raise self._wrong(f"{name} has {clips} clips, the index {here} of them")
        sizes = np.array([size for _, size, _ in self.shards])
        inside = (self.offset >= BLOCK) & (self.bytes > 0) & (self.bytes <= sizes[self.shard] - self.offset)
        if not inside.all():
            raise self._wrong("a clip lies outside of its shard")
        if not ((self.frames > 0) & (self.frames <= self.bytes // (4 * FEATURES))).all():
            raise self._wrong("a clip has more frames than its bytes hold")
        if not np.isin(self.splits, SPLITS).all():
            raise self._wrong(f"expected the splits {', '.join(SPLITS)}")

    def row(self, clip: int) -> dict[str, Any]:
        """What the index says of a clip: {id, split, label, captions, flips}."""
        group = int(np.searchsorted(self._ends, clip, side="right"))
        said = self._said
        if said is None or said[0] != group:
            self._said = said = group, self._group(group, ["id", "split", "label", "captions", "flips"])
        return said[1][clip - int(self._ends[group - 1] if group else 0)]

    def _group(self, group: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        arrow = need_pyarrow()
        try:
            table = self._parquet.read_row_group(group, columns=list(columns))
            table.validate(full=True)  # strings that are none
            return table.to_pylist()
        except (OSError, ValueError, arrow.ArrowException) as error:
            detail = " ".join(str(error).split())[:120]
            raise UserError(f"{self.folder / INDEX}: expected the index of a clip store, but {detail}") from error

    def captions(self, clip: int) -> list[str]:
        return list(self.row(clip)["captions"])

    def id(self, clip: int) -> str:
        return str(self.row(clip)["id"])

    def all_captions(self) -> Iterator[list[str]]:
        """The captions of clip after clip."""
        for group in range(len(self._ends)):
            yield from (row["captions"] for row in self._group(group, ["captions"]))

    def read(self, clip: int) -> NDArray[np.float32]:
        """The features float32 ``[T, 272]`` of clip number ``clip``. ``UserError`` where its bytes are something else."""
        try:
            return self.checked(clip)
        except UserError as error:
            raise UserError(
                f"{self.folder / SHARDS / self.shards[int(self.shard[clip])][0]}: {error}; import the data again"
            ) from error

    def checked(self, clip: int) -> NDArray[np.float32]:
        """``read``, for who names the shard in an error."""
        try:
            file = self._file(int(self.shard[clip]))
            content = os.pread(file.handle, int(self.bytes[clip]), int(self.offset[clip]))
            if zlib.crc32(content) != self.crc[clip]:
                raise UserError("the bytes have changed (their checksum is another)")
            features = read_features(content)
            if features.dtype != np.float32 or len(features) != self.frames[clip]:
                raise UserError(f"got {features.dtype} {list(features.shape)}")
        except (OSError, UserError) as error:
            raise UserError(
                f"expected features [{int(self.frames[clip])}, {FEATURES}] of the clip {self.id(clip)!r}, but {error}"
            ) from error
        return features.copy()  # one that may be written to

    def _file(self, number: int) -> "_OpenFile":
        with self._lock:
            if number not in self._files:
                if len(self._files) == OPEN_FILES:
                    self._files.popitem(last=False)
                self._files[number] = _OpenFile(self.folder / SHARDS / self.shards[number][0])
            self._files.move_to_end(number)
            return self._files[number]


class _OpenFile:
    """Closed when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
