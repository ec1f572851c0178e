"""Building ONNX graphs: nodes by hand, small constants inside, weights in one file beside them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from kinetok.errors import UserError, missing_package

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise missing_package("onnx", "onnx", "making ONNX graphs") from error

OPSETS = (23, 24, 18)
MICROSOFT = "com.microsoft"
ALIGNMENT = 4096  # what mapping a tensor straight from the file wants
IR_VERSION = {24: 11, 23: 11, 18: 10}
BFLOAT16 = np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))  # numpy has none of its own
ELEMENTS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    BFLOAT16: TensorProto.BFLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(bool): TensorProto.BOOL,
}

Make = Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class _Place:
    element: int
    shape: tuple[int, ...]
    offset: int
    size: int


class Weights(Protocol):
    """Where a graph's weights are kept: in a file (``WeightFile``) or in memory (``live.HeldWeights``)."""

    def put(self, name: str, make: Make, element: int | None = None, shape: Sequence[int] | None = None) -> Any:
        """The TensorProto that refers to a weight; ``make`` gives its values and is called once a name."""
        ...


class WeightFile:
    """Weights shared by the graphs of a folder: each written once, when first asked for, and then forgotten.

    ``element`` overrides a tensor's ONNX type where numpy has none for it (packed int4).
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self._places: dict[str, _Place] = {}

    def put(self, name: str, make: Make, element: int | None = None, shape: Sequence[int] | None = None) -> Any:
        """The TensorProto that refers to a weight; ``make`` gives its values and is called once a name."""
        if name not in self._places:
            array = np.ascontiguousarray(make())
            offset = -(-self.file.tell() // ALIGNMENT) * ALIGNMENT
            self.file.write(b"\0" * (offset - self.file.tell()))
            self.file.write(array.reshape(-1).view(np.uint8).data)  # a buffer of bfloat16 itself has no format
            kind = ELEMENTS[array.dtype] if element is None else element
            self._places[name] = _Place(kind, tuple(shape or array.shape), offset, array.nbytes)
        place = self._places[name]
        tensor = TensorProto(name=name, data_type=place.element, dims=place.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.name), ("offset", place.offset), ("length", place.size)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


@dataclass(slots=True)
class Graph:
    """One graph under construction. ``node`` returns the names of its outputs, which later nodes take as inputs."""

    name: str
    weights: Weights
    opset: int = 23
    _nodes: list[Any] = field(default_factory=list)
    _initializers: dict[str, Any] = field(default_factory=dict)
    _inputs: list[Any] = field(default_factory=list)
    _outputs: list[Any] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise UserError(f"opset: expected one of {', '.join(map(str, OPSETS))}, got {self.opset}")

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        count: int,
        *,
        unused: Sequence[int] = (),
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Append a node with ``count`` outputs; those that are unused have no name, so a runtime need not compute them."""
        self._count += 1
        outputs = [f"{op}_{self._count}" + (f"_{i}" if count > 1 else "") for i in range(count)]
        outputs = ["" if i in unused else output for i, output in enumerate(outputs)]
        self._nodes.append(
            helper.make_node(op, list(inputs), outputs, f"{op}_{self._count}", domain=domain, **attributes)
        )
        return outputs

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output."""
        return self.nodes(op, inputs, 1, domain=domain, **attributes)[0]

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        """A small constant, kept inside the graph."""
        array = np.asarray(value, dtype=dtype)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{digest}"
        self._initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, make: Make, element: int | None = None, shape: Sequence[int] | None = None) -> str:
        """A weight in the weights' file."""
        if name not in self._initializers:
            self._initializers[name] = self.weights.put(name, make, element, shape)
        return name

    def input(self, name: str, dtype: Any, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, ELEMENTS[np.dtype(dtype)], list(shape)))
        return name

    def output(self, value: str, name: str, dtype: Any, shape: Sequence[int | str]) -> None:
        """Give ``value`` the name of an output of the graph."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for at, found in enumerate(names):
                    if found == value:
                        names[at] = name
        self._outputs.append(helper.make_tensor_value_info(name, ELEMENTS[np.dtype(dtype)], list(shape)))

    def model(self) -> Any:
        """The finished ModelProto."""
        used = {node.domain for node in self._nodes}
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(used - {""})]
        return helper.make_model(
            graph, opset_imports=imports, ir_version=IR_VERSION[self.opset], producer_name="kinetok"
        )

    # Shorthands that every graph uses.

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis, -1 is what is left."""
        return self.node("Reshape", x, self.const(shape))

    def transpose(self, x: str, *perm: int) -> str:
        return self.node("Transpose", x, perm=perm)

    def cast(self, x: str, dtype: Any) -> str:
        return self.node("Cast", x, to=ELEMENTS[np.dtype(dtype)])

    def slice(self, x: str, axis: int, start: int | str, end: int | str, step: int = 1) -> str:
        """start and end: numbers, or names of int64 ``[1]`` tensors."""
        first, last = (value if isinstance(value, str) else self.const([value]) for value in (start, end))
        return self.node("Slice", x, first, last, self.const([axis]), self.const([step]))

    def size(self, x: str, axis: int) -> str:
        """The size of an axis, int64 ``[1]``."""
        return self.node("Shape", x, start=axis, end=axis + 1)

    def range(self, count: str) -> str:
        """int64 ``[count]`` from 0 on; count int64 ``[1]``."""
        return self.node("Range", self.const(0), self.node("Squeeze", count), self.const(1))


def check_model(path: str | Path, domains: Sequence[str] = ("",)) -> None:
    """Run onnx's checker on a file, and refuse operators of other domains than ``domains``.

    Raises ``RuntimeError``: a graph of ours that does not pass is our bug.
    """
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain not in domains})
    if foreign:
        raise RuntimeError(f"{path}: custom operators are left in the graph: {', '.join(foreign)}")
