"""Tensors out of files that may be hostile: no class is imported and no code of the file runs.

A ``.pth`` file is a zip archive with one pickle and the raw bytes of every storage. The pickle is a program for a small
stack machine. Here that machine is written out with the instructions that build plain values; the only calls it knows
are the few that rebuild tensors, and every other call, class or instance becomes an inert ``Stub``. There is thus no
``find_class`` that could import and no ``REDUCE`` that could run. Storages are mapped, not read.
"""

import io
import mmap
import pickletools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.tensor_files import map_file, mapped_tensor, natural, possible_shape, read_safetensors
from kinetok.model.zip_index import RESAVE, Entry, zip_entries

PICKLE_BYTES = 16 << 20
"""Bounds the objects a pickle can make: a released 7B file has 0.1 MB, and the worst pickle makes 90 bytes from one."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2")
_NUMBERS = frozenset(("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"))
_STRINGS = frozenset(
    ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
)
_BYTES = frozenset(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"))
_LITERALS = _NUMBERS | _STRINGS | _BYTES
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True, eq=False)
class Stub:
    """Stands for a class, function or object of the file that was neither imported nor built."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    elements: Tensor


def read_tensors(path: str | Path) -> Mapping[str, Any]:
    """The tensors of a ``.pth`` or ``.safetensors`` file by key, nested as in the file, plain values beside them.

    Tensors lie over the mapped file: they cost no private memory and must not be written to. Objects other than
    tensors, numbers, strings, lists, tuples and dictionaries are ``Stub``. Raises ``UserError`` when the file is
    truncated, damaged, hostile, compressed, big-endian or of the old non-zip kind.
    """
    data = map_file(path)
    head = data[:8]
    if head[:4] == b"PK\x03\x04":
        return _read_zip(data, str(path))
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    if head[:1] == b"\x80" or head[:2] == b"\x8a\x0a":
        raise UserError(f"{path}: expected a zip-based .pth file, got the legacy torch format; {RESAVE}")
    raise UserError(f"{path}: expected a .pth (zip) or .safetensors checkpoint, got a file that starts with {head!r}")


def _read_zip(data: mmap.mmap, path: str) -> Mapping[str, Any]:
    entries = zip_entries(data, path)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise UserError(f"{path}: expected one data.pkl in the zip file, got {len(pickles)}: not a torch checkpoint")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(root + "byteorder")
    if order is not None and data[order.offset : order.offset + min(order.size, 16)].strip() != b"little":
        raise UserError(f"{path}: expected little-endian tensors, got another byte order; {RESAVE} on a usual machine")
    program = entries[pickles[0]]
    if program.size > PICKLE_BYTES:
        raise UserError(
            f"{path}: expected at most {PICKLE_BYTES} bytes of pickle, got {program.size}; "
            "save it again with its tensors alone"
        )
    machine = _Machine(data, entries, root, path)
    try:
        result = machine.run(data[program.offset : program.offset + program.size])
    except (IndexError, KeyError, TypeError, ValueError, EOFError, OverflowError, struct.error) as error:
        if isinstance(error, UserError):
            raise
        detail = " ".join(str(error)[:100].split())
        raise UserError(f"{path}: its pickle is damaged ({type(error).__name__}: {detail})") from error
    if not isinstance(result, dict):
        raise UserError(f"{path}: expected a dictionary of tensors, got {type(result).__name__}")
    return result


class _Machine:
    """The pickle stack machine over plain values, tensors and stubs."""

    def __init__(self, data: mmap.mmap, entries: dict[str, Entry], root: str, path: str) -> None:
        self.data, self.entries, self.root, self.path = data, entries, root, path
        self.storages: dict[tuple[str, torch.dtype], _Storage] = {}
        self.stubs: dict[str, Stub] = {}

    def run(self, program: bytes) -> Any:
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        for opcode, raw, _ in pickletools.genops(io.BytesIO(program)):
            name, argument = opcode.name, cast(Any, raw)
            if name in _LITERALS:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in ("PROTO", "FRAME"):
                continue
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(stack)
                stack = []
            elif name in _TUPLES:
                count = _TUPLES[name]
                if count > len(stack):
                    raise IndexError("the stack is empty")
                stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "EMPTY_SET":
                stack.append(self._stub("set"))
            elif name in ("TUPLE", "LIST", "DICT", "FROZENSET", "INST", "OBJ"):
                items, stack = stack, marks.pop()
                stack.append(self._collect(name, argument, items))
            elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
                items, stack = stack, marks.pop()
                self._extend(stack[-1], items, pairs=name == "SETITEMS")
            elif name == "APPEND":
                item = stack.pop()
                self._extend(stack[-1], [item], pairs=False)
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._extend(stack[-1], [key, value], pairs=True)
            elif name == "GLOBAL":
                stack.append(self._stub(argument.replace(" ", ".")))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._stub(f"{_text(module)}.{_text(attribute)}"))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            elif name == "NEWOBJ_EX":
                del stack[-2:]
                stack.append(self._call(stack.pop(), None))
            elif name == "BUILD":
                # Attributes are state of classes that are not built; an OrderedDict's _metadata is of no use here.
                stack.pop()
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "POP":
                if stack:
                    stack.pop()
                else:
                    stack = marks.pop()
            elif name == "POP_MARK":
                stack = marks.pop()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name in ("EXT1", "EXT2", "EXT4"):
                stack.append(self._stub("extension"))
            elif name == "STOP":
                return stack.pop()
            else:
                raise ValueError(f"unexpected instruction {name}")
        raise EOFError("the pickle has no end")

    def _stub(self, name: str) -> Stub:
        return self.stubs.setdefault(name, Stub(name))

    def _collect(self, kind: str, argument: Any, items: list[Any]) -> Any:
        if kind == "TUPLE":
            return tuple(items)
        if kind == "LIST":
            return items
        if kind == "DICT":
            result: dict[Any, Any] = {}
            self._extend(result, items, pairs=True)
            return result
        return self._stub("frozenset" if kind == "FROZENSET" else str(argument or "object"))

    @staticmethod
    def _extend(target: Any, items: list[Any], *, pairs: bool) -> None:
        if isinstance(target, Stub):
            return
        if pairs:
            if not isinstance(target, dict) or len(items) % 2:
                raise TypeError("items set on something that is no dictionary")
            for key, value in zip(items[::2], items[1::2], strict=True):
                # Hashing a tuple recurses in C, so a deep one would crash; no tensor is named by one.
                if type(key) in _PLAIN_KEYS:
                    target[key] = value
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise TypeError("items appended to something that is no list")

    def _call(self, function: Any, arguments: Any) -> Any:
        """The result of a call that rebuilds a tensor; a stub for any other call. Nothing is ever called."""
        name = function.name if isinstance(function, Stub) else "object"
        if not isinstance(arguments, tuple):
            return self._stub(name)
        if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) >= 3:
            # A tensor with Python attributes: (function, class, arguments, state).
            inner, _, arguments = arguments[:3]
            name = inner.name if isinstance(inner, Stub) else "object"
            if not isinstance(arguments, tuple):
                return self._stub(name)
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0] if arguments and isinstance(arguments[0], Tensor) else self._stub(name)
        module, _, last = name.rpartition(".")
        if module == "torch._utils" and last in _REBUILD and arguments and isinstance(arguments[0], _Storage):
            return self._tensor(arguments[0].elements, *arguments[1:4])
        if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
            return tuple(arguments[0])
        if name == "collections.OrderedDict":
            result: dict[Any, Any] = {}
            for pair in arguments[0] if arguments and isinstance(arguments[0], list) else ():
                self._extend(result, list(pair), pairs=True)
            return result
        return self._stub(name)

    def _storage(self, reference: Any) -> Any:
        if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
            raise ValueError("a reference to something that is no storage")
        kind, key, count = reference[1], reference[2], reference[4]
        dtype = STORAGES.get(kind.name.rpartition(".")[2]) if isinstance(kind, Stub) else None
        if dtype is None:
            return self._stub("storage")
        if type(key) is not str or not natural(count):
            raise ValueError("a storage without a name and a size")
        if (key, dtype) not in self.storages:
            entry = self.entries.get(f"{self.root}data/{key}")
            if entry is None or entry.size != count * dtype.itemsize:
                size = "nothing" if entry is None else f"{entry.size} bytes"
                raise UserError(
                    f"{self.path}: expected {count} elements of {dtype} in data/{key[:40]}, got {size}: damaged"
                )
            if entry.offset % dtype.itemsize:
                raise UserError(f"{self.path}: data/{key[:40]} is not aligned; {RESAVE}")
            self.storages[key, dtype] = _Storage(mapped_tensor(self.data, dtype, entry.offset, count))
        stored = self.storages[key, dtype]
        if stored.elements.numel() != count:
            raise UserError(f"{self.path}: data/{key[:40]} is given two different sizes: damaged")
        return stored

    def _tensor(self, elements: Tensor, offset: Any, shape: Any, strides: Any) -> Tensor:
        if not (
            natural(offset)
            and isinstance(shape, tuple)
            and isinstance(strides, tuple)
            and len(shape) == len(strides)
            and possible_shape(shape)
            and all(map(natural, strides))
        ):
            raise UserError(f"{self.path}: a tensor has an impossible shape, stride or offset: damaged or hostile")
        count = prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else 0
        # More elements than the storage has would be an expanded view, which fills memory when it is copied.
        if count > elements.numel() or (count and last >= elements.numel()):
            raise UserError(
                f"{self.path}: a tensor of shape {list(shape)} reaches outside its {elements.numel()} stored elements: "
                "damaged or hostile"
            )
        return elements.as_strided(shape, strides, offset) if count else elements.new_empty(shape)


def _text(value: Any) -> str:
    # Bounded, since a pickle can repeat a long name at the cost of two bytes.
    if type(value) is not str or len(value) > 500:
        raise ValueError("a class without a name, or with an endless one")
    return value
