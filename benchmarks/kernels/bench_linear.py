"""Products of a decode step on packed weights: ``python benchmarks/kernels/bench_linear.py --json FILE``.

Weights move once, x and y next to nothing: the share is that of the copy bandwidth. The other routes multiply by the
unpacked weight in the activations' dtype, which for int8, int4 and fp8 moves two to four times the bytes. "float" is the
dtype the models run in: bf16 on a GPU, fp32 on a CPU. On a CPU ours is the definition, which unpacks the weight first.
"""

from functools import partial

import torch
from harness import Bench, Case, Route, half, main, pytest_entry
from torch.nn import functional as F

from kinetok.kernels.linear import linear, pack, unpack

EPS = 1e-5
SHAPES = {
    "qkv": (12288, 4096),
    "out": (4096, 4096),
    "gate_up": (22016, 4096),
    "down": (4096, 11008),
    "head": (64001, 4096),
}
SMALL = {"qkv": (576, 192), "gate_up": (1024, 192), "head": (4376, 192)}


def plain(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, *, norm: bool, swiglu: bool, add: bool
) -> torch.Tensor:
    """The operator in library calls: norm, one product, activation or sum."""
    if norm:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS)
    y = F.linear(x, weight)
    if swiglu:
        gate, up = y.chunk(2, dim=1)
        y = F.silu(gate) * up
    return residual + y if add else y


def int8_of_torch(weight: torch.Tensor, norm: bool, swiglu: bool, add: bool) -> dict[str, Route]:
    """torch's own weight-only int8 product, where it has one: eager epilogues around it."""
    if swiglu or add or norm or not hasattr(torch, "_weight_int8pack_mm"):
        return {}
    scale = weight.abs().amax(1) / 127
    numbers = (weight / scale[:, None]).round().to(torch.int8)
    return {"torch int8pack": lambda x, *_: torch._weight_int8pack_mm(x, numbers, scale.to(x.dtype))}


def build(size: tuple[str, str, int, str, int], device: torch.device) -> Case:
    model, layer, batch, kind, group = size
    rows, columns = (SHAPES if model == "7B" else SMALL)[layer]
    dtype = half(device)
    if kind == "float":
        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    weight = torch.randn(rows, columns, device=device) * columns**-0.5
    norm, swiglu, add = layer in ("qkv", "gate_up", "head"), layer == "gate_up", layer in ("out", "down")
    packed = pack(weight, kind, group=group, paired=swiglu)
    x = torch.randn(batch, columns, device=device, dtype=dtype)
    residual = torch.randn(batch, rows, device=device, dtype=dtype)
    dense = unpack(packed)
    route = partial(plain, norm=norm, swiglu=swiglu, add=add)
    library = int8_of_torch(dense, norm, swiglu, add) if kind == "int8" and not group else {}

    def ours(x: torch.Tensor, _: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return linear(x, packed, eps=EPS if norm else None, residual=residual if add else None, swiglu=swiglu)

    def exact(x: torch.Tensor, _: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return route(x.double(), dense.double(), residual.double())

    outputs = batch * (rows // 2 if swiglu else rows)
    return Case(
        args=(x, dense.to(dtype), residual),
        ours=ours,
        eager=route,
        exact=exact,
        library=library,
        moved=packed.nbytes + (x.numel() + (2 if add else 1) * outputs) * x.element_size(),
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,
        graph=True,
    )


def named(model: str, layer: str, batch: int, kind: str, group: int = 0) -> tuple[str, tuple[str, str, int, str, int]]:
    return f"{model} {layer}, {kind}, batch {batch}", (model, layer, batch, kind, group)


SIZES = dict(
    [
        *(
            named("7B", layer, 1, kind, group)
            for kind, group in (("float", 0), ("int8", 0), ("int4", 128))
            for layer in SHAPES
            if layer != "head" or kind != "int4"
        ),
        *(named("7B", "gate_up", batch, kind) for batch in (16, 64, 256) for kind in ("float", "int8")),
        named("7B", "down", 1, "fp8"),
        *(named("default", layer, batch, "float") for layer in SMALL for batch in (1, 64)),
    ]
)
LINEAR = Bench(
    "linear",
    SIZES,
    build,
    cpu=[name for name in SIZES if name.startswith("default")],
    quick=["7B gate_up, float, batch 1", "7B gate_up, int8, batch 1", "default gate_up, float, batch 1"],
)
test_linear = pytest_entry(LINEAR)

if __name__ == "__main__":
    main(LINEAR)
