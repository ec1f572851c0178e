"""Sampling on the device, and the head with its arg-max: ``python benchmarks/kernels/bench_sampling.py --json FILE``.

The eager routes draw from torch's own generator, so only ours names its draws; the check is that of ours against the
definition, to the bit. The head's eager route writes its logits.
"""

from dataclasses import fields

import torch
from harness import Bench, Case, half, main, pytest_entry
from torch.nn import functional as F

from kinetok.kernels.linear import pack, unpack
from kinetok.kernels.sampling import Draw, SamplingState, greedy_step, reference, sample_step

END = 7
STATE = [field.name for field in fields(SamplingState)]


def fresh(state: SamplingState) -> SamplingState:
    """The state with counters of its own, so that every call starts from the same place."""
    own = {name: getattr(state, name) for name in STATE}
    return SamplingState(**{**own, **{name: own[name].clone() for name in ("position", "remaining", "status")}})


def build_sample(size: tuple[int, int, int, float], device: torch.device) -> Case:
    rows, classes, top_k, top_p = size
    draws = [Draw(seed=row, request=row, most=300, top_k=top_k, top_p=top_p) for row in range(rows)]
    state = SamplingState.start(draws, device)
    logits = torch.randn(rows, classes, device=device) * 3

    def eager(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if top_k:
            logits = logits.where(logits >= logits.topk(top_k).values[:, -1:], -torch.inf)
        if top_p < 1:
            p, order = logits.softmax(1).sort(descending=True)
            logits = logits.scatter(1, order, logits.gather(1, order).where(p.cumsum(1) - p < top_p, -torch.inf))
        return torch.multinomial(logits.softmax(1), 1)[:, 0]

    def exact(logits: torch.Tensor) -> torch.Tensor:
        values = [getattr(fresh(SamplingState.start(draws)), name) for name in STATE]
        return reference.sample_step(logits.cpu(), None, *values, END, -1).to(device)

    return Case(
        args=(logits,),
        ours=lambda logits: sample_step(logits, fresh(state), end_id=END),
        eager=eager,
        exact=exact,
        moved=logits.nbytes + 8 * rows,
        tolerance=0,
        graph=True,
    )


def build_head(size: tuple[int, int, int], device: torch.device) -> Case:
    rows, classes, width = size
    dtype = half(device)
    head = pack(torch.randn(classes, width, device=device) * width**-0.5, "bf16" if dtype == torch.bfloat16 else "fp32")
    state = SamplingState.start([Draw(most=300)] * rows, device)
    x, dense = torch.randn(rows, width, device=device, dtype=dtype), unpack(head).to(dtype)
    return Case(
        args=(x, dense),
        ours=lambda x, _: greedy_step(x, head, fresh(state), end_id=END),
        eager=lambda x, dense: F.linear(x, dense).argmax(1),
        exact=lambda x, _: (x.double() @ dense.double().T).argmax(1),
        moved=head.nbytes + x.nbytes + 8 * rows,
        tolerance=0.05 if dtype == torch.bfloat16 else 0,  # two logits may lie within a rounding of each other
        graph=True,
    )


SAMPLE = Bench(
    "sample_step",
    {
        "default, 1 x 4376": (1, 4376, 0, 1.0),
        "default, 64 x 4376, top-p": (64, 4376, 0, 0.9),
        "7B, 1 x 64001": (1, 64001, 0, 1.0),
        "7B, 64 x 64001": (64, 64001, 0, 1.0),
        "7B, 64 x 64001, top-k, top-p": (64, 64001, 50, 0.9),
    },
    build_sample,
    cpu=("default, 1 x 4376", "default, 64 x 4376, top-p", "7B, 1 x 64001"),
    quick=("default, 1 x 4376", "7B, 64 x 64001"),
)
GREEDY = Bench(
    "greedy_step",
    {
        "default, 1 x 4376 x 192": (1, 4376, 192),
        "7B, 1 x 64001 x 4096": (1, 64001, 4096),
        "7B, 64 x 64001 x 4096": (64, 64001, 4096),
    },
    build_head,
    cpu=("default, 1 x 4376 x 192",),
    quick=("default, 1 x 4376 x 192", "7B, 1 x 64001 x 4096"),
)
test_sampling = pytest_entry(SAMPLE, GREEDY)

if __name__ == "__main__":
    main(SAMPLE, GREEDY)
