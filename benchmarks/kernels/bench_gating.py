"""SwiGLU and its gradient: ``python benchmarks/kernels/bench_gating.py --json FILE``."""

import torch
from harness import Bench, Case, half, main, pytest_entry
from torch import Tensor

from kinetok.kernels.gating import reference, swiglu

SIZES = {
    "default, 1200 x 512": (1200, 512),
    "7B, 64 x 11008": (64, 11008),
    "7B, 16384 x 11008": (16384, 11008),
}
CPU = ("default, 1200 x 512", "7B, 64 x 11008")
QUICK = ("default, 1200 x 512",)


def liger(device: torch.device, gradients: bool):  # type: ignore[no-untyped-def]
    """Liger Kernel's route, where it is installed."""
    if device.type != "cuda":
        return {}
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}

    def route(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())

    return {"liger": both(route) if gradients else route}


def both(gate):  # type: ignore[no-untyped-def]
    def step(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(gate(x), (x,), grad)

    return step


def build(size: tuple[int, int], device: torch.device) -> Case:
    x = torch.randn(size[0], 2 * size[1], device=device, dtype=half(device))
    return Case(
        args=(x,),
        ours=swiglu,
        eager=reference.swiglu,
        library=liger(device, False),
        moved=x.nbytes * 3 // 2,
        tolerance=1e-2 if device.type == "cuda" else 1e-5,
    )


def build_gradients(size: tuple[int, int], device: torch.device) -> Case:
    x = torch.randn(size[0], 2 * size[1], device=device, dtype=half(device))
    grad = torch.randn(size, device=device, dtype=half(device))
    return Case(
        args=(x, grad),
        ours=both(swiglu),
        eager=both(reference.swiglu),
        library=liger(device, True),
        moved=x.nbytes * 3 // 2 + 2 * x.nbytes + grad.nbytes,  # x, y; then x, the gradient of y, that of x
        tolerance=2e-2 if device.type == "cuda" else 1e-5,
        compiled=False,  # no whole graph around autograd.grad
    )


SWIGLU = Bench("swiglu", SIZES, build, cpu=CPU, quick=QUICK)
GRADIENTS = Bench("swiglu, gradients", SIZES, build_gradients, cpu=CPU, quick=())
test_gating = pytest_entry(SWIGLU, GRADIENTS)

if __name__ == "__main__":
    main(SWIGLU, GRADIENTS)
