"""Skinny products in Triton: weights stream through once, in tiles of 64 rows; the batch is the narrow side."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase
from kinetok.kernels.linear.product import WEIGHT_TYPE, adjacent, case, launches, product, scaled, sizes


@triton.jit
def linear_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    batch,
    x_stride,
    residual_stride,
    eps,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BATCH_TILE: tl.constexpr,
    NORMALISE: tl.constexpr,
    SWIGLU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    total, square, whole = product(
        x_ptr,
        data_ptr,
        scale_ptr,
        partial_ptr,
        counter_ptr,
        batch,
        x_stride,
        COLUMNS,
        KIND,
        GROUP,
        WIDTH,
        SPLIT,
        BATCH_TILE,
        NORMALISE,
        STAGES,
    )
    if whole:
        y = scaled(total, square, scale_ptr, eps, COLUMNS, KIND, GROUP, NORMALISE)
        if SWIGLU:
            gate, up = tl.split(tl.permute(tl.reshape(y, (32, 2, BATCH_TILE)), (0, 2, 1)))
            y = gate / (1.0 + tl.exp(-gate)) * up
        n = tl.program_id(2) * y.shape[0] + tl.arange(0, y.shape[0])
        b = tl.program_id(0) * BATCH_TILE + tl.arange(0, BATCH_TILE)
        inside = (n[:, None] < OUTPUTS) & (b[None, :] < batch)
        if HAS_RESIDUAL:
            add = tl.load(residual_ptr + b[None, :].to(tl.int64) * residual_stride + n[:, None], mask=inside, other=0.0)
            y += add.to(tl.float32)
        at = b[None, :].to(tl.int64) * OUTPUTS + n[:, None]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def packed_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    counters: Tensor,
    kind: str,
    group: int,
    rows: int,
    eps: float | None,
    residual: Tensor | None,
    swiglu: bool,
    wide: bool,
) -> Tensor:
    outputs = rows // 2 if swiglu else rows
    y = torch.empty((len(x), outputs), device=x.device, dtype=torch.float32 if wide else x.dtype)
    added = y if residual is None else adjacent(residual)
    for some, grid, shared in launches(x, data, scale, counters, kind, group, rows, eps):
        linear_kernel[grid](
            residual_ptr=added[some],
            y_ptr=y[some],
            residual_stride=added.stride(0),
            OUTPUTS=outputs,
            SWIGLU=swiglu,
            HAS_RESIDUAL=residual is not None,
            **shared,
        )
    return y


def _case(model: str, layer: str, outputs: int, columns: int, kind: str, group: int = 0, tile: int = 16) -> AotCase:
    swiglu = layer == "gate_up"
    normalise = layer in ("qkv", "gate_up", "head")
    constants = sizes(2 * outputs if swiglu else outputs, columns, kind, group, tile, normalise)
    activation = WEIGHT_TYPE[kind if kind in ("fp32", "fp16") else "bf16"]
    return case(
        f"linear_{model}_{layer}_{kind}{f'_g{group}' if group else ''}_b{tile}",
        linear_kernel,
        {**constants, "OUTPUTS": outputs, "SWIGLU": swiglu, "HAS_RESIDUAL": layer in ("out", "down")},
        {"residual_ptr": activation, "y_ptr": activation},
        {"residual_stride": "i32"},
        ("residual_stride",),
    )


def _aot() -> list[AotCase]:
    layers = {
        "7b": {"qkv": (12288, 4096), "out": (4096, 4096), "gate_up": (11008, 4096), "down": (4096, 11008)},
        "3b": {"gate_up": (8704, 3200), "down": (3200, 8704)},
        "default": {"qkv": (576, 192), "gate_up": (512, 192), "head": (4376, 192)},
    }
    cases = [_case("7b", "gate_up", *layers["7b"]["gate_up"], "int4", 64, 32)]  # first: it needs the most registers
    cases += [_case("7b", layer, *shape, kind) for layer, shape in layers["7b"].items() for kind in ("bf16", "int8")]
    cases += [_case("7b", layer, *shape, "int4", 128) for layer, shape in layers["7b"].items()]
    cases += [_case("7b", "gate_up", *layers["7b"]["gate_up"], "bf16", tile=tile) for tile in (32, 64)]
    cases += [_case("7b", "down", *layers["7b"]["down"], kind, group) for kind, group in (("fp8", 0), ("int8", 128))]
    cases += [_case("7b", "gate_up", *layers["7b"]["gate_up"], kind, tile=64) for kind in ("int8", "fp8")]
    cases += [_case("7b", "gate_up", *layers["7b"]["gate_up"], "int8", 64, 32)]
    cases += [_case("3b", layer, *shape, "bf16") for layer, shape in layers["3b"].items()]
    cases += [
        _case("default", layer, *shape, kind) for layer, shape in layers["default"].items() for kind in ("fp32", "fp16")
    ]
    return cases


AOT = _aot()
