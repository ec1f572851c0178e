"""Attention over a text prefix and in decoding: ``python benchmarks/kernels/bench_attention.py --json FILE``.

Ours is the backend that the models take on this device: the Triton kernels on a GPU, and on a CPU torch's
scaled_dot_product_attention, which is then no other route. The eager route is the formula. What a prefill executes is
counted as 4 head sizes of operations for each pair of a query and a key that it sees, two and a half times as much again
with the gradients.
"""

from functools import partial

import torch
from harness import Bench, Case, Route, half, main, pytest_entry
from torch import Tensor

from kinetok.kernels.attention import attention_backends, decode_attention, prefix_attention, reference

Prefill = tuple[int, int, int, int, int]  # clips, text, positions, heads, head size
Decode = tuple[int, int, int, int, str]  # clips, positions in use, heads, head size, cache
CAPACITY = 512


def others(device: torch.device, *without: str) -> list[str]:
    """Backends of other libraries that run here."""
    if device.type != "cuda":
        return []
    return [
        name
        for name, problem in attention_backends(device).items()
        if problem is None and name not in ("reference", "triton", *without)
    ]


def formula(q: Tensor, k: Tensor, v: Tensor, text: Tensor) -> Tensor:
    return reference.prefix_attention(q, k, v, text, torch.full_like(text, q.shape[1]))[0]


def tolerance(device: torch.device) -> float:
    return 1e-2 if device.type == "cuda" else 1e-5


def build_prefill(size: Prefill, device: torch.device, *, gradients: bool = False) -> Case:
    clips, text, positions, heads, head_dim = size
    q, k, v, grad = (
        torch.randn(clips, positions, heads, head_dim, device=device, dtype=half(device)) for _ in range(4)
    )
    lengths = torch.full((clips,), text, device=device)
    pairs = clips * heads * (text * text + sum(range(text + 1, positions + 1)))

    def step(route: Route) -> Route:
        def both(q: Tensor, k: Tensor, v: Tensor, text: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            o = route(*leaves, text)
            return o.detach(), *torch.autograd.grad(o, leaves, grad)

        return both if gradients else lambda q, k, v, text, _: route(q, k, v, text)

    return Case(
        args=(q, k, v, lengths, grad),
        ours=step(prefix_attention),
        eager=step(formula),
        library={name: step(partial(prefix_attention, backend=name)) for name in others(device)},
        moved=(8 if gradients else 4) * q.nbytes,
        work=int(4 * head_dim * pairs * (3.5 if gradients else 1)),
        rate=q.dtype,
        tolerance=tolerance(device),
        compiled=not gradients,
    )


def build_decode(size: Decode, device: torch.device) -> Case:
    clips, positions, heads, head_dim, kind = size
    q = torch.randn(clips, heads, head_dim, device=device, dtype=half(device))
    shape = (clips, heads, CAPACITY, head_dim)
    caches = [torch.randn(shape, device=device).to(torch.float8_e4m3fn if kind == "fp8" else q.dtype) for _ in range(2)]
    scale = torch.full((2, clips, heads), 0.5, device=device) if kind == "fp8" else None
    lengths = torch.full((clips,), positions, device=device)
    used = 2 * clips * heads * positions * head_dim * caches[0].element_size()

    def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        if kind == "fp8":
            k, v = (x.double() * 0.5 for x in (k, v))
        return reference.decode_attention(q.double(), k.double(), v.double(), lengths)

    return Case(
        args=(q, *caches, lengths),
        ours=lambda *args: decode_attention(*args, scale),
        eager=lambda *args: reference.decode_attention(*args, scale),
        exact=exact,
        library={
            name: partial(decode_attention, kv_scale=scale, backend=name)
            for name in others(device, "varlen", *(["flash"] if kind == "fp8" else []))
        },
        moved=used + 2 * q.nbytes,
        tolerance=tolerance(device),
        graph=True,
    )


PREFILL = Bench(
    "prefix_attention",
    {
        "default, 16 x (20 + 100)": (16, 20, 120, 6, 32),
        "7B, 1 x 150": (1, 150, 150, 32, 128),
        "7B, 16 x (60 + 241)": (16, 60, 301, 32, 128),
        "3B, 16 x (60 + 241)": (16, 60, 301, 32, 100),
    },
    build_prefill,
    cpu=("default, 16 x (20 + 100)",),
    quick=("default, 16 x (20 + 100)", "7B, 16 x (60 + 241)"),
)
GRADIENTS = Bench(
    "prefix_attention, gradients",
    {"default, 16 x (20 + 100)": (16, 20, 120, 6, 32), "7B, 16 x (60 + 241)": (16, 60, 301, 32, 128)},
    partial(build_prefill, gradients=True),
    cpu=("default, 16 x (20 + 100)",),
)
DECODE = Bench(
    "decode_attention",
    {
        "default, 64 clips at 100": (64, 100, 6, 32, "plain"),
        "7B, 1 clip at 300": (1, 300, 32, 128, "plain"),
        "7B, 64 clips at 300": (64, 300, 32, 128, "plain"),
        "7B, 64 clips at 300, fp8": (64, 300, 32, 128, "fp8"),
        "3B, 64 clips at 300": (64, 300, 32, 100, "plain"),
    },
    build_decode,
    cpu=("default, 64 clips at 100",),
    quick=("default, 64 clips at 100", "7B, 64 clips at 300"),
)
test_attention = pytest_entry(DECODE, PREFILL, GRADIENTS)

if __name__ == "__main__":
    main(DECODE, PREFILL, GRADIENTS)
