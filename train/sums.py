"""Checksums of the files of a sharded checkpoint: counted as the bytes are written, compared before they are used."""

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

LARGE = 1 << 20  # bytes of a write that is worth another thread
PIECE = 1 << 22  # bytes of a file that are in memory while it is read again


class _Stream:
    """A file that is written from the beginning to the end, and the CRC-32 of what went into it. A large write is counted
    while it is written: both let other threads run."""

    def __init__(self, raw: Any, helper: ThreadPoolExecutor) -> None:
        self.raw, self.helper, self.crc = raw, helper, 0

    def write(self, content: Any) -> int:
        if len(content) < LARGE:
            self.crc = zlib.crc32(content, self.crc)
            written: int = self.raw.write(content)
            return written
        crc = self.helper.submit(zlib.crc32, content, self.crc)
        try:
            written = self.raw.write(content)
        finally:
            self.crc = crc.result()  # the bytes are only there until this returns
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


class _Files(FileSystem):
    """Files of this process, and the CRC-32 of each that it has written."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as raw, ThreadPoolExecutor(1, thread_name_prefix="sums") as helper:
            stream = _Stream(raw, helper)
            yield stream
        self.sums[Path(path).name] = stream.crc


@dataclass(frozen=True)
class _Written(WriteResult):
    """Something that is in a file whose CRC-32 is ``crc``."""

    crc: int


class SummedWriter(FileSystemWriter):
    """``FileSystemWriter`` that counts sums as it writes: nothing is read again, and no message is sent but those that
    tell the first process what was written. There ``sums`` then holds the CRC-32 of the files of all processes."""

    def __init__(self, folder: Path) -> None:
        # One thread a process: what fails in a second one, such as a full disk, torch prints and forgets.
        super().__init__(folder, thread_count=1, sync_files=True)
        self.fs = self.files = _Files()
        self.sums: dict[str, int] = {}

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        made = super().write_data(plan, planner).wait()
        summed: Future[list[WriteResult]] = Future()
        summed.set_result([_Written(**vars(one), crc=self.files.sums[one.storage_data.relative_path]) for one in made])
        return summed

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        self.sums = {one.storage_data.relative_path: one.crc for written in results for one in written}
        super().finish(metadata, results)


def changed(folder: Path, sums: Mapping[str, int]) -> str | None:
    """The first file of a folder that is not what was written there, in words; None where all are. In constant memory."""
    buffer = memoryview(bytearray(PIECE))
    for name, expected in sums.items():
        try:
            crc = 0
            with (folder / name).open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    crc = zlib.crc32(buffer[:count], crc)
        except OSError as error:
            return f"cannot read {name}: {error.strerror or error}"
        if crc != expected:
            return f"bad checksum of {name}"
    return None
