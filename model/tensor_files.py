"""Tensors in files without holding them in memory: mapped reading, streamed writing of safetensors.

The safetensors layout is written here rather than by the library because the library wants a whole shard in memory;
here the private memory is one chunk, whatever the size of the model.
"""

import json
import mmap
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.files import whole_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK_BYTES = 32 << 20
HEADER_BYTES = 16 << 20
SIZE_LIMIT = 1 << 62


def map_file(path: str | Path) -> mmap.mmap:
    """Map a file read-only. Raises ``UserError`` when it is absent, empty or unreadable."""
    if sys.byteorder != "little":
        raise UserError(f"cannot read {path}: checkpoints are little-endian and this machine is not")
    try:
        with Path(path).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: expected a checkpoint, got an empty file") from error


def mapped_tensor(data: mmap.mmap, dtype: torch.dtype, offset: int, count: int) -> Tensor:
    """``count`` elements at byte ``offset`` as a flat tensor over the mapping. It must not be written to."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    assert offset >= 0 and offset + count * dtype.itemsize <= len(data)
    with warnings.catch_warnings():
        # torch warns that the mapping is read-only, which is the point of it.
        warnings.filterwarnings("ignore", message=".*non-writable.*|.*not writable.*")
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset)


def natural(value: object) -> bool:
    """Whether ``value`` is a whole number that a file may use as a size."""
    return type(value) is int and 0 <= value < SIZE_LIMIT


def possible_shape(shape: Sequence[Any]) -> bool:
    """Whether torch can have a tensor of this shape: few axes, and counts that fit even with the empty axes left out."""
    return len(shape) <= 16 and all(map(natural, shape)) and prod(size for size in shape if size) < SIZE_LIMIT


def parse_json(text: bytes, name: str | Path) -> dict[str, Any]:
    """A JSON object. Raises ``UserError`` for anything else, endless nesting included."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: expected JSON, got something else ({' '.join(str(error)[:100].split())})") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped and read-only. Raises ``UserError`` when the file is damaged."""
    data = map_file(path)
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(HEADER_BYTES, len(data) - 8):
        raise UserError(f"{path}: expected a safetensors file, but its header does not fit: truncated or not one")
    header = parse_json(data[8 : 8 + size], path)
    header.pop("__metadata__", None)
    start, end = 8 + size, 0
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: _position(item[1], path)):
        dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
        first, last = entry["data_offsets"]
        if dtype is None:
            raise UserError(
                f"{path}: expected {name} to have one of the types {list(DTYPES)}, got {str(entry.get('dtype'))[:40]!r}"
            )
        if not isinstance(shape, list) or not possible_shape(shape):
            raise UserError(f"{path}: expected {name} to have whole numbers as its shape, got {str(shape)[:80]}")
        if first != end or last - first != prod(shape) * dtype.itemsize or start + last > len(data):
            raise UserError(f"{path}: the bytes of {name} do not fit its shape {shape}: truncated or damaged")
        if (start + first) % dtype.itemsize:
            raise UserError(f"{path}: {name} is not aligned; write the file again with safetensors")
        tensors[name] = mapped_tensor(data, dtype, start + first, prod(shape)).reshape(shape)
        end = last
    if start + end != len(data):
        raise UserError(f"{path}: {len(data) - start - end} bytes belong to no tensor: truncated or damaged")
    return tensors


def _position(entry: Any, path: str | Path) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(natural, offsets)):
        raise UserError(f"{path}: expected two data_offsets for every tensor: not a safetensors file, or damaged")
    return offsets[0], offsets[1]


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor to be written: ``parts`` laid one after the other along their first axis. Parts may be strided views."""

    name: str
    parts: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> list[int]:
        first = self.parts[0].shape
        return [sum(part.shape[0] for part in self.parts), *first[1:]] if first else []

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in row-major order, about ``CHUNK_BYTES`` at a time."""
        for part in self.parts:
            part = part.detach().reshape(1) if part.ndim == 0 else part.detach()
            rows = max(1, CHUNK_BYTES // max(1, prod(part.shape[1:]) * part.dtype.itemsize))
            for first in range(0, part.shape[0], rows):
                block = part[first : first + rows].cpu().contiguous()
                if block.numel():
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message=".*non-writable.*|.*not writable.*")
                        yield block.flatten().view(torch.uint8).numpy().data


def write_safetensors(path: str | Path, tensors: Iterable[Pieces]) -> None:
    """Write a safetensors file chunk by chunk, whole or not at all. Names must differ; parts of one share a dtype."""
    # Wider types first keeps every tensor aligned, as the format asks for.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        assert tensor.name not in header and all(part.dtype == tensor.dtype for part in tensor.parts)
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for chunk in tensor.chunks():
                file.write(chunk)


def shard(tensors: Iterable[Pieces], limit: int) -> list[list[Pieces]]:
    """Cut a list of tensors, into files of at most ``limit`` bytes; a larger tensor gets a file of its own."""
    if not natural(limit) or limit == 0:
        raise UserError(f"expected the shard size to be a positive number of bytes, got {limit!r}")
    shards: list[list[Pieces]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards
