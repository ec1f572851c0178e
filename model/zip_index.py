"""Where the entries of a stored (uncompressed) zip file lie, so that they can be mapped instead of read.

Own reading of the directory rather than ``zipfile``: sizes are bounded before anything is allocated, and entries that
overlap, repeat or are compressed are refused, since a checkpoint has no use for them.
"""

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise

from kinetok.errors import UserError

DIRECTORY_BYTES = 32 << 20
RESAVE = "save it again with torch.save(state, path), which stores tensors uncompressed"
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Entry:
    """Bytes ``[offset, offset + size)`` of the file."""

    offset: int
    size: int


def zip_entries(data: mmap.mmap, path: str) -> dict[str, Entry]:
    """Entries by name. Raises ``UserError`` for a truncated, compressed, encrypted or contradictory archive."""
    try:
        return _entries(data, path)
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the zip directory is damaged ({error})") from error


def _entries(data: mmap.mmap, path: str) -> dict[str, Entry]:
    start, size = _directory(data, path)
    directory = data[start : start + size]
    entries: dict[str, Entry] = {}
    spans = [(start, len(data))]
    at = 0
    while at < size:
        mark, _, _, flags, method, _, _, _, packed, plain, names, extras, comments, _, _, _, offset = (
            _ENTRY.unpack_from(directory, at)
        )
        raw = directory[at + _ENTRY.size : at + _ENTRY.size + names]
        extra = directory[at + _ENTRY.size + names : at + _ENTRY.size + names + extras]
        at += _ENTRY.size + names + extras + comments
        if mark != b"PK\x01\x02" or at > size:
            raise UserError(f"{path}: the zip directory is damaged")
        plain, packed, offset = _wide(extra, plain, packed, offset)
        name = raw.decode("utf-8")
        if method or packed != plain:
            raise UserError(f"{path}: the entry {name!r} is compressed; {RESAVE}")
        if flags & 0x2041:
            raise UserError(f"{path}: the entry {name!r} is encrypted; {RESAVE}")
        if name in entries:
            raise UserError(f"{path}: the entry {name!r} occurs twice in the zip directory")
        if offset + _LOCAL.size > start:
            raise UserError(f"{path}: the entry {name!r} lies outside the file: truncated or damaged")
        local = _LOCAL.unpack_from(data, offset)
        first = offset + _LOCAL.size + local[9] + local[10]
        if local[0] != b"PK\x03\x04" or data[offset + _LOCAL.size : offset + _LOCAL.size + local[9]] != raw:
            raise UserError(f"{path}: the entry {name!r} has two different names: damaged")
        if first + plain > start:
            raise UserError(f"{path}: the entry {name!r} lies outside the file: truncated or damaged")
        entries[name] = Entry(first, plain)
        spans.append((offset, first + plain))
    spans.sort()
    if any(end > following for (_, end), (following, _) in pairwise(spans)):
        raise UserError(f"{path}: entries of the zip file overlap")
    return entries


def _directory(data: mmap.mmap, path: str) -> tuple[int, int]:
    """Offset and size of the central directory."""
    tail_start = max(0, len(data) - _END.size - 0xFFFF)
    tail = data[tail_start:]
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or found + _END.size > len(tail):
        raise UserError(f"{path}: the zip directory at its end is missing: the file is truncated, fetch it again")
    end = tail_start + found
    _, disk, first_disk, _, entries, size, start, comment = _END.unpack_from(data, end)
    if end + _END.size + comment != len(data):
        raise UserError(f"{path}: the zip directory at its end is damaged: truncated or followed by other data")
    if _FULL in (size, start) or 0xFFFF in (entries, disk):
        if end < _LOCATOR.size:
            raise UserError(f"{path}: the zip directory is damaged")
        mark, _, at, _ = _LOCATOR.unpack_from(data, end - _LOCATOR.size)
        if mark != b"PK\x06\x07" or at + _END64.size > end:
            raise UserError(f"{path}: the zip directory is damaged")
        mark, _, _, _, disk, first_disk, _, _, size, start = _END64.unpack_from(data, at)
        if mark != b"PK\x06\x06":
            raise UserError(f"{path}: the zip directory is damaged")
        end = at
    if disk or first_disk:
        raise UserError(f"{path}: expected one zip file, got a part of a split one")
    if start + size > end:
        raise UserError(f"{path}: the zip directory lies outside the file: truncated or damaged")
    if size > DIRECTORY_BYTES:
        raise UserError(f"{path}: expected a zip directory of at most {DIRECTORY_BYTES} bytes, got {size}")
    return start, size


def _wide(extra: bytes, plain: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Replace the 32-bit fields that overflowed by their 64-bit values."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = [value[0] for value in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + size - size % 8])][::-1]
            if plain == _FULL and values:
                plain = values.pop()
            if packed == _FULL and values:
                packed = values.pop()
            if offset == _FULL and values:
                offset = values.pop()
        at += 4 + size
    return plain, packed, offset
