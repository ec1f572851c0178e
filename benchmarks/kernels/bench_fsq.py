"""Finite scalar quantisation in fp32: ``python benchmarks/kernels/bench_fsq.py --json FILE``.

"one-hot" is how the released code comes by its indices: it counts the codes in a matrix of codebook x positions, also
when it only encodes (64,000 x 3,072 numbers for a training batch). Where that is possible, it is a route here.
"""

import torch
from harness import Bench, Case, main, pytest_entry
from torch import Tensor
from torch.nn import functional as F

from kinetok.kernels.fsq import fsq_decode, fsq_dequantize, fsq_encode, fsq_perplexity, fsq_quantize, reference

RELEASED, DEFAULT = (8, 8, 8, 5, 5, 5), (7, 5, 5, 5, 5)
Size = tuple[int, int, tuple[int, ...]]  # positions, width, levels
SIZES: dict[str, Size] = {
    "default, 64 x 96 frames": (64 * 48, 256, DEFAULT),
    "released, 64 x 96 frames": (64 * 48, 512, RELEASED),
    "released, 262144 positions": (1 << 18, 512, RELEASED),
}
SMALL = [name for name, (positions, _, _) in SIZES.items() if positions < 10_000]


def one_hot(x: Tensor, weight: Tensor, bias: Tensor, levels: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, perplexity and the share of the codebook in use, with every code's occurrences written out."""
    top, shift = x.new_tensor(levels), x.new_tensor(reference.level_constants(levels)[2])
    half, offset = (top - 1) * 1.001 / 2, (top % 2 == 0) * 0.5
    width, basis = top // 2, x.new_tensor(reference.level_constants(levels)[4])
    codes = (torch.tanh(F.linear(x, weight, bias) + shift) * half - offset).round() / width
    indices = ((codes * width + width) * basis).sum(-1).to(torch.int32)
    codebook = int(top.prod())
    chosen = torch.zeros(codebook, len(x), device=x.device)
    chosen.scatter_(0, indices.long()[None], 1)
    share = chosen.mean(1)
    return indices, torch.exp(-(share * torch.log(share + 1e-7)).sum()), (share > 0).float().mean()


def latents(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    positions, width, levels = size
    weight = torch.randn(len(levels), width, device=device) * width**-0.5
    return torch.randn(positions, width, device=device), weight, torch.randn(len(levels), device=device)


def exact_indices(x: Tensor, weight: Tensor, bias: Tensor, levels: tuple[int, ...]) -> Tensor:
    return reference.fsq_encode(x.double(), weight.double(), bias.double(), levels)


def build_encode(size: Size, device: torch.device) -> Case:
    positions, _, levels = size
    x, weight, bias = latents(size, device)
    return Case(
        args=(x, weight, bias),
        ours=lambda *args: fsq_encode(*args, levels),
        eager=lambda *args: reference.fsq_encode(*args, levels),
        library={"one-hot": lambda *args: one_hot(*args, levels)} if positions < 10_000 else {},
        moved=x.nbytes + 4 * positions,
        tolerance=1e-3,  # of the positions: a number may lie within a rounding of the border of its level
    )


def build_measured(size: Size, device: torch.device) -> Case:
    _, _, levels = size
    x, weight, bias = latents(size, device)
    codebook = torch.Size(levels).numel()

    def ours(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = fsq_encode(*args, levels)
        return indices, *fsq_perplexity(indices, codebook)

    def exact(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = exact_indices(*args, levels)
        share = torch.bincount(indices, minlength=codebook).double() / len(indices)
        return indices, torch.exp(-(share * torch.log(share + 1e-7)).sum()), (share > 0).double().mean()

    return Case(
        args=(x, weight, bias),
        ours=ours,
        eager=lambda *args: one_hot(*args, levels),
        exact=exact,
        moved=x.nbytes + 4 * len(x),
        tolerance=1e-3,
        compiled=False,  # ours counts the codes that occur: a size that no graph knows
    )


def build_decode(size: Size, device: torch.device) -> Case:
    positions, width, levels = size
    indices = torch.randint(torch.Size(levels).numel(), (positions,), device=device, dtype=torch.int32)
    weight, bias = torch.randn(width, len(levels), device=device), torch.randn(width, device=device)
    table = fsq_dequantize(torch.arange(torch.Size(levels).numel(), device=device), levels)
    return Case(
        args=(indices, weight, bias),
        ours=lambda *args: fsq_decode(*args, levels),
        eager=lambda *args: reference.fsq_decode(*args, levels),
        library={"table": lambda indices, weight, bias: F.linear(F.embedding(indices, table), weight, bias)},
        moved=4 * positions * (1 + width),
        tolerance=1e-6,
    )


def build_quantize(size: Size, device: torch.device) -> Case:
    positions, _, levels = size
    z = torch.randn(positions, len(levels), device=device)
    return Case(
        args=(z,),
        ours=lambda z: fsq_quantize(z, levels),
        eager=lambda z: reference.fsq_quantize(z, levels),
        moved=2 * z.nbytes + 4 * positions,
        tolerance=5e-3,
    )


ENCODE = Bench("fsq_encode", SIZES, build_encode, cpu=SMALL, quick=SMALL[:1])
MEASURED = Bench("fsq_encode, perplexity", {name: SIZES[name] for name in SMALL}, build_measured, quick=SMALL[:1])
DECODE = Bench("fsq_decode", SIZES, build_decode, cpu=SMALL, quick=SMALL[:1])
QUANTIZE = Bench("fsq_quantize", {"released, 8388608 positions": (1 << 23, 6, RELEASED)}, build_quantize, cpu=())
test_fsq = pytest_entry(ENCODE, MEASURED, DECODE, QUANTIZE)

if __name__ == "__main__":
    main(ENCODE, DECODE, QUANTIZE, MEASURED)
