"""Rotary position code, alone and with the cache's write: ``python benchmarks/kernels/bench_rotary.py --json FILE``."""

import torch
from harness import Bench, Case, half, main, pytest_entry
from torch import Tensor

from kinetok.kernels.rotary import apply_rotary, reference, rotary_kv_write, rotary_table

Size = tuple[int, int, int, int]  # clips, positions, heads, head size
CAPACITY = 512


def complex_product(x: Tensor, table: Tensor) -> Tensor:
    """The rotation as LLaMA's own code has it: a product of complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table)[:, :, None]).flatten(-2).to(x.dtype)


def build(size: Size, device: torch.device) -> Case:
    x = torch.randn(size, device=device, dtype=half(device))
    table = rotary_table(size[1], size[3]).to(device)[None]
    return Case(
        args=(x, table),
        ours=apply_rotary,
        eager=reference.apply_rotary,
        library={"complex product": complex_product},
        moved=2 * x.nbytes + table.nbytes,
        tolerance=1e-2 if device.type == "cuda" else 1e-6,
    )


def build_write(size: Size, device: torch.device) -> Case:
    clips, positions, heads, head_dim = size
    qkv = torch.randn(clips, positions, 3, heads, head_dim, device=device, dtype=half(device))
    starts = torch.arange(clips, device=device) * 3 % (CAPACITY - positions)
    at = starts[:, None] + torch.arange(positions, device=device)
    table = rotary_table(CAPACITY, head_dim).to(device)[at]
    caches = [torch.zeros(clips, heads, CAPACITY, head_dim, device=device, dtype=qkv.dtype) for _ in range(2)]

    def ours(qkv: Tensor, table: Tensor, starts: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return rotary_kv_write(qkv, table, starts, k, v), k, v

    def eager(qkv: Tensor, table: Tensor, starts: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return reference.rotary_kv_write(qkv, table, starts, k, v), k, v

    return Case(
        args=(qkv, table, starts, *caches),
        ours=ours,
        eager=eager,
        moved=2 * qkv.nbytes + table.nbytes,
        tolerance=1e-2 if device.type == "cuda" else 1e-6,
        graph=positions == 1,
    )


ROTARY = Bench(
    "apply_rotary",
    {"default, 16 x 301": (16, 301, 6, 32), "7B, 16 x 301": (16, 301, 32, 128), "7B, 64 x 512": (64, 512, 32, 128)},
    build,
    cpu=("default, 16 x 301",),
)
WRITE = Bench(
    "rotary_kv_write",
    {
        "default, 1 clip": (1, 1, 6, 32),
        "default, 64 clips": (64, 1, 6, 32),
        "7B, 1 clip": (1, 1, 32, 128),
        "7B, 64 clips": (64, 1, 32, 128),
        "7B, 16 x 150 of a prefill": (16, 150, 32, 128),
    },
    build_write,
    cpu=("default, 1 clip", "default, 64 clips"),
)
test_rotary = pytest_entry(ROTARY, WRITE)

if __name__ == "__main__":
    main(WRITE, ROTARY)
