"""What a precision means for weights: how they are stored, and the product that reads them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.graphs.builder import BFLOAT16, MICROSOFT, Graph, TensorProto

PRECISIONS = ("fp32", "fp16", "int8", "int4")
TENSORRT_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")  # ONNX Runtime has no bf16 kernels for a CPU
BLOCK = 32
INT8_BLOCK = 64  # for ONNX Runtime: its product is a quarter faster than with 32, and errs hardly more
_FLOATS: dict[str, np.dtype] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": BFLOAT16}
# MatMulNBits' accuracy_level: activations in int8 by blocks, which is where its speed comes from, or as they are.
INT8_ACTIVATIONS, FP32_ACTIVATIONS = 4, 1

Tensors = Callable[[str], Tensor]
"""A model's weights by name, one at a time, so that a model need not be in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """What a model's weights and activations are. ``target`` "ort" takes one of ``PRECISIONS`` and stores int8 and int4 for
    MatMulNBits with fp32 activations; "tensorrt" one of ``TENSORRT_PRECISIONS``, for DequantizeLinear with fp16 ones."""

    name: str
    target: str = "ort"

    def __post_init__(self) -> None:
        names = PRECISIONS if self.target == "ort" else TENSORRT_PRECISIONS
        if self.name not in names:
            raise UserError(f"dtype: expected one of {', '.join(names)}, got {self.name!r}")

    @property
    def activations(self) -> np.dtype:
        return _FLOATS.get(self.name, _FLOATS["fp32" if self.target == "ort" else "fp16"])

    @property
    def storage(self) -> np.dtype:
        """Of what is not quantised but large: the embedding."""
        return _FLOATS.get(self.name, _FLOATS["fp16"])

    @property
    def bits(self) -> int:
        """Of the weights of products; 0: not quantised."""
        return {"int8": 8, "int4": 4}.get(self.name, 0)

    def block(self, bits: int) -> int:
        """How many weights of a row share a scale."""
        return INT8_BLOCK if bits == 8 and self.target == "ort" else BLOCK


def to_numpy(value: Tensor, dtype: np.dtype, name: str) -> np.ndarray:
    """A weight in ``dtype``, contiguous. ``UserError`` where it does not fit into its range."""
    # torch copies a transposed matrix several times faster than numpy, and a 7B has 13 GB of them.
    kind = torch.bfloat16 if dtype == BFLOAT16 else torch.from_numpy(np.empty(0, dtype)).dtype
    result = value.detach().to(kind).cpu().contiguous()
    if not all(math.isfinite(float(end)) for end in torch.aminmax(result)):
        raise UserError(f"{name}: the model's weights do not fit into {dtype}: export it as fp32")
    return result.view(torch.uint8).numpy().view(BFLOAT16) if kind == torch.bfloat16 else result.numpy()


def quantize(weight: Tensor, bits: int, block: int = BLOCK, *, positive: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric integers ``[N, blocks, block]`` (int8, from -2^(bits-1) on) and fp32 scales ``[N, blocks]`` of ``[N, K]``.

    The largest number of a block becomes the lowest integer, which has one step more than the highest, so a scale may be
    negative; positive: it becomes plus or minus the highest one (TensorRT takes no negative scales). K is padded with
    zeros to whole blocks.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    padded = torch.nn.functional.pad(weight.float(), (0, blocks * block - columns)).view(rows, blocks, block)
    largest = padded.gather(2, padded.abs().argmax(2, keepdim=True))[..., 0]
    lowest = -(1 << (bits - 1))
    scale = largest.abs() / (-lowest - 1) if positive else largest / lowest
    safe = torch.where(scale == 0, 1.0, scale)
    codes = (padded / safe[..., None]).round().clamp(lowest, -lowest - 1).to(torch.int8)
    return codes.numpy(), scale.numpy()


def dequantize(codes: np.ndarray, scale: np.ndarray, columns: int) -> Tensor:
    """The fp32 weight ``[N, K]`` that ``quantize``'s result stands for."""
    return torch.from_numpy((codes * scale[..., None]).reshape(len(codes), -1)[:, :columns])


def linear(
    g: Graph, x: str, name: str, tensors: Tensors, precision: Precision, shape: tuple[int, int], bits: int
) -> str:
    """``x [..., K]`` times the weight ``name``, ``[N, K]`` in ``tensors``; bits 0 leaves it in the activations' dtype."""
    dtype = precision.activations
    if not bits:

        def transposed() -> np.ndarray:
            return to_numpy(tensors(name).T, dtype, name)

        return g.node("MatMul", x, g.weight(name, transposed))
    rows, columns = shape
    tensorrt = precision.target == "tensorrt"
    block = precision.block(bits)
    made: dict[str, np.ndarray] = {}  # both halves come from one quantisation; each is dropped as it is written

    def part(which: str) -> np.ndarray:
        if not made:
            made["codes"], made["scale"] = quantize(tensors(name), bits, block, positive=tensorrt)
        return made.pop(which)

    if tensorrt:
        return _dequantized(g, x, name, part, dtype, bits, (rows, columns))

    def packed() -> np.ndarray:
        codes = (part("codes").astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
        return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4

    def scales() -> np.ndarray:
        return part("scale").astype(dtype)

    operands = g.weight(f"{name}.int{bits}", packed), g.weight(f"{name}.scale", scales)
    return g.node(
        "MatMulNBits",
        x,
        *operands,
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=INT8_ACTIVATIONS,
    )


def _dequantized(
    g: Graph,
    x: str,
    name: str,
    part: Callable[[str], np.ndarray],
    dtype: np.dtype,
    bits: int,
    shape: tuple[int, int],
) -> str:
    """A product with DequantizeLinear in blocks along K, which TensorRT's parsers read; K a multiple of the block."""
    rows, columns = shape
    if columns % BLOCK:
        raise UserError(f"{name}: {bits}-bit weights need a width that is a multiple of {BLOCK}, got {columns}")

    def codes() -> np.ndarray:
        values = np.ascontiguousarray(part("codes").reshape(rows, columns).T)  # [K, N]
        if bits == 8:
            return values
        flat = (values & 15).astype(np.uint8).reshape(-1)
        return flat[0::2] | flat[1::2] << 4

    def scales() -> np.ndarray:
        return np.ascontiguousarray(part("scale").T.astype(dtype))  # [K / block, N]

    element: Any = TensorProto.INT4 if bits == 4 else None
    stored = g.weight(f"{name}.int{bits}", codes, element, (columns, rows))
    weight = g.node("DequantizeLinear", stored, g.weight(f"{name}.scale", scales), axis=0, block_size=BLOCK)
    return g.node("MatMul", x, weight)
