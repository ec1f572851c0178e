"""Whether a clip store is whole: every byte of every shard against the index."""

import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

from kinetok.errors import UserError
from kinetok.train.data.arrays import check_features
from kinetok.train.data.shards import BLOCK, SHARDS, ClipStore

MOST_JSON = 100_000_000  # bytes of what is said of one clip


def check_store(store: ClipStore, *, progress: Callable[[int, int, str], None] | None = None) -> None:
    """Read every shard as the plain tar it is. Raises ``UserError`` for the first thing that is not as the index says.

    Each clip is two plain members, its ``.json`` and its ``.npy``, with no others between; a member of another kind (a link,
    an absolute or other name, a size that is not there) is refused before it is read.
    """
    clip = 0
    for name, size, clips in store.shards:
        path = store.folder / SHARDS / name
        try:
            with path.open("rb") as file:
                for _ in range(clips):
                    if progress is not None:
                        progress(clip, len(store), name)
                    _check_clip(store, clip, file, size)
                    clip += 1
                if file.read().strip(b"\0"):
                    raise UserError("there is more in it than its clips")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}; import the data again") from error


def _check_clip(store: ClipStore, clip: int, file: io.BufferedReader, size: int) -> None:
    row = store.row(clip)
    try:
        said: Any = json.loads(_member(file, f"{clip:09d}.json", None, size))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"expected JSON in {clip:09d}.json, but {' '.join(str(error).split())[:80]}") from error
    if said != {name: row[name] for name in ("id", "captions", "label", "split")}:
        raise UserError(f"{clip:09d}.json says something else than the index")
    at = file.tell() + BLOCK
    if at != store.offset[clip]:
        raise UserError(f"{clip:09d}.npy is at {at}, the index has it at {store.offset[clip]}")
    _member(file, f"{clip:09d}.npy", int(store.bytes[clip]), size)
    try:
        check_features(store.checked(clip), 1)  # which compares the bytes with their checksum
    except UserError as error:
        raise UserError(f"{clip:09d}.npy: {error}") from error


def _member(file: io.BufferedReader, name: str, expected: int | None, size: int) -> bytes:
    """The content of the next member, which must be the plain file ``name``."""
    try:
        member = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise UserError(f"expected the member {name}, but {error}") from error
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise UserError(f"expected the plain file {name}, got a member of type {member.type!r}")
    if member.name != name:
        raise UserError(f"expected the member {name}, got {member.name[:60]!a}")
    limit = min(MOST_JSON, size - file.tell())
    if not 0 <= member.size <= limit or (expected is not None and member.size != expected):
        wanted = f"at most {limit}" if expected is None else str(expected)
        raise UserError(f"expected {wanted} bytes of {name}, got {member.size}")
    content = file.read(member.size)
    file.seek(-member.size % BLOCK, io.SEEK_CUR)
    return content
