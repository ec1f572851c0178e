"""The two ends of the tokenizer's decoder in fp32: ``python benchmarks/kernels/bench_detokenizer.py --json FILE``.

The eager routes are the layers one after another. ``fsq_conv`` has project_out folded into the convolution beforehand, so
it multiplies by the 5 or 6 numbers of a code where the layers multiply by the 256 or 512 of an embedding; "folded, eager"
does as much in plain torch. ``conv_idwt`` takes its fp32 products in three of TF32 on a GPU, so that its share of the
measured fp32 rate may pass 1. "conv1d" is the library's convolution without TF32, on input in its own layout.
"""

import torch
from harness import Bench, Case, main, pytest_entry
from torch import Tensor
from torch.nn import functional as F

from kinetok.kernels.detokenizer import conv, conv_idwt, fold_projection, fsq_conv, reference
from kinetok.kernels.fsq import reference as fsq
from kinetok.kernels.wavelet import idwt

RELEASED, DEFAULT = (8, 8, 8, 5, 5, 5), (7, 5, 5, 5, 5)
CENTRED, CAUSAL = (1, 1), (2, 0)
First = tuple[int, int, int, tuple[int, ...], tuple[int, int]]  # clips, tokens, width, levels, padding
Last = tuple[
    int, int, int, int, tuple[int, int], int
]  # clips, frames before the wavelet, width, levels, padding, features


def build_first(size: First, device: torch.device) -> Case:
    clips, tokens, width, levels, padding = size
    indices = torch.randint(torch.Size(levels).numel(), (clips, tokens), device=device)
    weight, bias = torch.randn(width, 3, width, device=device) * (3 * width) ** -0.5, torch.randn(width, device=device)
    project, shift = torch.randn(width, len(levels), device=device), torch.randn(width, device=device)
    table = fold_projection(weight.double(), project.double(), shift.double()).float()

    def layers(indices: Tensor, weight: Tensor, bias: Tensor, project: Tensor, shift: Tensor) -> Tensor:
        return F.relu(conv(fsq.fsq_decode(indices, project, shift, levels), weight, bias, padding, 1))

    return Case(
        args=(indices, weight, bias, project, shift),
        ours=lambda indices, weight, bias, *_: fsq_conv(indices, table, bias, levels, padding),
        eager=layers,
        library={
            "folded, eager": lambda indices, weight, bias, *_: reference.fsq_conv(
                indices, table, bias, levels, padding, 1
            )
        },
        moved=indices.nbytes + table.nbytes + 4 * clips * tokens * width,
        tolerance=1e-5,
    )


def build_last(size: Last, device: torch.device) -> Case:
    clips, frames, width, levels, padding, features = size
    outputs = features << levels
    x = torch.randn(clips, frames, width, device=device)
    weight = torch.randn(outputs, 3, width, device=device) * (3 * width) ** -0.5
    bias, scale, shift = (torch.randn(n, device=device) for n in (outputs, features, features))
    first, turned = x.transpose(1, 2).contiguous(), weight.transpose(1, 2).contiguous()

    def ours(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return conv_idwt(x, weight, bias, levels=levels, padding=padding, scale=scale, shift=shift)

    def library(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(allow_tf32=False):
            y = F.conv1d(F.pad(F.relu(first), padding), turned, bias)
        return idwt(y, levels).transpose(1, 2) * scale + shift

    return Case(
        args=(x, weight, bias, scale, shift),
        ours=ours,
        eager=lambda *args: reference.conv_idwt(*args, levels, padding, 1),
        library={"conv1d": library},
        moved=x.nbytes + weight.nbytes + 4 * clips * frames * outputs,
        work=2 * clips * frames * outputs * 3 * width,
        rate=torch.float32,
        tolerance=1e-5,
    )


FIRST = Bench(
    "fsq_conv",
    {
        "default, 1 clip of 6 s": (1, 90, 256, DEFAULT, CAUSAL),
        "released, 1 clip of 10 s": (1, 150, 512, RELEASED, CENTRED),
        "released, 64 clips of 10 s": (64, 150, 512, RELEASED, CENTRED),
        "released, 1024 clips of 10 s": (1024, 150, 512, RELEASED, CENTRED),
    },
    build_first,
    cpu=("default, 1 clip of 6 s", "released, 1 clip of 10 s"),
    quick=("default, 1 clip of 6 s", "released, 64 clips of 10 s"),
)
LAST = Bench(
    "conv_idwt",
    {
        "default, 1 clip of 6 s": (1, 180, 256, 0, CAUSAL, 272),
        "released, 1 clip of 10 s": (1, 300, 512, 0, CENTRED, 272),
        "released, 64 clips of 10 s": (64, 300, 512, 0, CENTRED, 272),
        "patch 2, 64 clips of 10 s": (64, 150, 512, 1, CENTRED, 272),
        "released, 512 clips of 10 s": (512, 300, 512, 0, CENTRED, 272),
    },
    build_last,
    cpu=("default, 1 clip of 6 s", "released, 1 clip of 10 s"),
    quick=("default, 1 clip of 6 s", "released, 64 clips of 10 s"),
)
test_detokenizer = pytest_entry(FIRST, LAST)

if __name__ == "__main__":
    main(FIRST, LAST)
