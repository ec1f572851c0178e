"""RMSNorm, alone and after a sum: ``python benchmarks/kernels/bench_norm.py --json FILE``."""

import torch
from harness import Bench, Case, half, main, pytest_entry
from torch import Tensor
from torch.nn import functional as F

from kinetok.kernels.norm import add_rms_norm, reference, rms_norm

EPS = 1e-5
SIZES = {
    "default, 64 x 192": (64, 192),
    "default, 1200 x 192": (1200, 192),
    "7B, 1 x 4096": (1, 4096),
    "7B, 64 x 4096": (64, 4096),
    "7B, 65536 x 4096": (65536, 4096),
}
CPU = ("default, 64 x 192", "default, 1200 x 192", "7B, 64 x 4096")
QUICK = ("default, 64 x 192",)


def numbers(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(shape, device=device, dtype=half(device)) for shape in (size, size, size[1:]))  # type: ignore[return-value]


def tolerance(device: torch.device) -> float:
    return 1e-2 if device.type == "cuda" else 1e-5


def build(size: tuple[int, int], device: torch.device) -> Case:
    x, _, scale = numbers(size, device)
    return Case(
        args=(x, scale),
        ours=rms_norm,
        eager=reference.rms_norm,
        library={"F.rms_norm": lambda x, scale: F.rms_norm(x, scale.shape, scale, EPS)},
        moved=2 * x.nbytes + scale.nbytes,
        tolerance=tolerance(device),
        graph=size[0] <= 64,
    )


def build_add(size: tuple[int, int], device: torch.device) -> Case:
    x, residual, scale = numbers(size, device)

    def library(x: Tensor, residual: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return F.rms_norm(total, scale.shape, scale, EPS), total

    return Case(
        args=(x, residual, scale),
        ours=add_rms_norm,
        eager=reference.add_rms_norm,
        library={"F.rms_norm": library},
        moved=4 * x.nbytes + scale.nbytes,
        tolerance=tolerance(device),
        graph=size[0] <= 64,
    )


def build_gradients(size: tuple[int, int], device: torch.device) -> Case:
    x, grad, scale = numbers(size, device)

    def both(norm):  # type: ignore[no-untyped-def]
        def step(x: Tensor, grad: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_()
            return torch.autograd.grad(norm(x, scale), (x, scale), grad)

        return step

    return Case(
        args=(x, grad, scale),
        ours=both(rms_norm),
        eager=both(reference.rms_norm),
        library={"F.rms_norm": both(lambda x, scale: F.rms_norm(x, scale.shape, scale, EPS))},
        moved=5 * x.nbytes + 3 * scale.nbytes,  # x, y; then x, the gradient of y, that of x
        tolerance=tolerance(device),
        compiled=False,  # no whole graph around autograd.grad
    )


NORM = Bench("rms_norm", SIZES, build, cpu=CPU, quick=QUICK)
ADD = Bench("add_rms_norm", SIZES, build_add, cpu=CPU, quick=QUICK)
LARGE = {name: SIZES[name] for name in ("default, 1200 x 192", "7B, 65536 x 4096")}
GRADIENTS = Bench("rms_norm, gradients", LARGE, build_gradients, cpu=CPU, quick=())
test_norm = pytest_entry(NORM, ADD, GRADIENTS)

if __name__ == "__main__":
    main(NORM, ADD, GRADIENTS)
