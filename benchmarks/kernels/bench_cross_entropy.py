"""Fused linear cross-entropy, forward and backward: ``python benchmarks/kernels/bench_cross_entropy.py --json FILE``.

The work is that of three products of N x V x d, 6 N V d operations: both routes execute as many.
"""

from importlib.util import find_spec

import torch
from harness import Bench, Case, Route, half, main, pytest_entry
from torch.nn.functional import cross_entropy

from kinetok.kernels.cross_entropy import linear_cross_entropy, reference

CLASSES = 64001


def with_gradients(loss: Route) -> Route:
    """(hidden, weight, targets) -> the loss and both gradients of a loss function."""

    def step(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        value = loss(h, w, targets)
        return value.detach(), *torch.autograd.grad(value, (h, w))

    return step


def in_parts(rows: int) -> Route:
    """Loss and gradients in fp64 some rows at a time: whole logits of the large sizes do not fit."""

    def step(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = weight.double().requires_grad_()
        total, grad_hidden, grad_weight = 0.0, [], torch.zeros_like(wide)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            h = h.double().requires_grad_()
            loss = cross_entropy(h @ wide.T, t, reduction="sum") / len(targets)
            one, other = torch.autograd.grad(loss, (h, wide))
            total, grad_weight = total + loss.detach(), grad_weight + other
            grad_hidden.append(one)
        return torch.as_tensor(total), torch.cat(grad_hidden), grad_weight

    return step


def liger() -> dict[str, Route]:
    """Liger Kernel's route, where it is installed."""
    if find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return {"liger": with_gradients(lambda h, w, t: fused(w, h, t))}


def build(size: tuple[int, int, int], device: torch.device) -> Case:
    rows, classes, width = size
    dtype = half(device)
    hidden = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(classes, width, device=device, dtype=dtype) * width**-0.5
    targets = torch.randint(classes, (rows,), device=device)
    elements = 2 * (rows * width + classes * width)  # both are read, both gradients are written
    return Case(
        args=(hidden, weight, targets),
        ours=with_gradients(linear_cross_entropy),
        eager=with_gradients(reference.linear_cross_entropy),
        exact=in_parts(256),
        library=liger() if device.type == "cuda" else {},
        moved=elements * hidden.element_size(),
        work=6 * rows * classes * width,
        rate=dtype,
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4,
        compiled=device.type == "cuda",
    )


CROSS_ENTROPY = Bench(
    "linear_cross_entropy",
    {
        "default, 1200 x 1001 x 192": (1200, 1001, 192),
        "111M, 512 x 64001 x 768": (512, CLASSES, 768),
        "1B, 8192 x 64001 x 1536": (8192, CLASSES, 1536),
        "7B, 8192 x 64001 x 4096": (8192, CLASSES, 4096),
    },
    build,
    cpu=("default, 1200 x 1001 x 192", "111M, 512 x 64001 x 768"),
    quick=("default, 1200 x 1001 x 192", "7B, 8192 x 64001 x 4096"),
)
test_cross_entropy = pytest_entry(CROSS_ENTROPY)

if __name__ == "__main__":
    main(CROSS_ENTROPY)
