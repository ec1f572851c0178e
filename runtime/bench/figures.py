"""From times to figures: bytes and operations of a step, shares of the measured limits, who keeps a deadline."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from kinetok.model.decoder import MotionDecoder
from kinetok.model.packed import PackedLinear
from kinetok.runtime.bench.clock import copy_bandwidth, matmul_rate, read_bandwidth, spread
from kinetok.runtime.bench.record import Row

DEADLINES_MS = (16.6, 66.7)  # a frame of a 60 Hz game; a token of the released tokenizer


def _read(decoder: MotionDecoder) -> Iterable[torch.nn.Module]:
    """What a step reads whatever the batch: the blocks and the head."""
    return (*decoder.blocks, decoder.head)


def bytes_of(*parts: torch.nn.Module) -> int:
    """Bytes of weights and packed words, each tensor once."""
    tensors = {id(tensor): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def step_bytes(decoder: MotionDecoder, batch: int, keys: float, kv: torch.dtype | None) -> float:
    """The fewest bytes of one step: each weight once, as it is stored, the embeddings' rows, and ``keys`` positions of keys
    and values in ``kv``."""
    config, size = decoder.config, decoder.embed.weight.element_size()
    weights = bytes_of(*_read(decoder))
    norm, kv_size = config.n_embd * size, 0 if kv is None else kv.itemsize
    return weights + norm + batch * config.n_embd * (size + 2 * config.n_layer * keys * kv_size)


def step_work(decoder: MotionDecoder, batch: int, keys: float) -> float:
    """Floating-point operations of the products of one step."""
    products = 0
    for part in _read(decoder):
        for layer in part.modules():
            if isinstance(layer, PackedLinear):
                products += layer.rows * layer.columns
            elif isinstance(layer, torch.nn.Linear):
                products += layer.weight.numel()
    return 2.0 * batch * (products + 2 * decoder.config.n_layer * decoder.config.n_embd * keys)


def rates(
    decoder: MotionDecoder,
    device: torch.device,
    floats: torch.dtype,
    batch: int,
    keys: float,
    kv: torch.dtype | None,
    step: float,
) -> dict[str, float]:
    """GB/s and operations of a step of ``step`` seconds, as shares of what the device copies, reads and multiplies."""
    moved, work = step_bytes(decoder, batch, keys, kv) / step, step_work(decoder, batch, keys) / step
    return {
        "gb_per_s": moved / 1e9,
        "mbu": moved / copy_bandwidth(device),
        "mbu_read": moved / read_bandwidth(device),
        "mfu": work / matmul_rate(device, floats),
    }


def name_of(dtype: torch.dtype | None) -> str:
    """As the results write it; "none" of a cache that is not there."""
    names = {None: "none", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return names.get(dtype, "fp8")


def inter_token(runs: Sequence[Sequence[float]]) -> list[float]:
    """Milliseconds between neighbouring tokens; a run holds the seconds from its start to each token."""
    return [1e3 * (b - a) for run in runs for a, b in pairwise(run)]


def latencies(runs: Sequence[Sequence[float]]) -> dict[str, float]:
    """ttft, tpot, itl and e2el of several runs."""
    return {
        **spread("ttft", [1e3 * run[0] for run in runs]),
        **spread("tpot", [1e3 * (run[-1] - run[0]) / (len(run) - 1) for run in runs]),
        **spread("itl", inter_token(runs)),
        **spread("e2el", [1e3 * run[-1] for run in runs]),
    }


def characters(rows: Sequence[Row]) -> dict[str, int]:
    """The largest measured batch of ours whose steps keep a deadline 99 times in 100; 0 where none does."""
    return {
        f"{deadline}_ms": max(
            (row["batch"] for row in rows if row["route"] == "ours" and row["p99_itl_ms"] <= deadline), default=0
        )
        for deadline in DEADLINES_MS
    }


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over turns, each of which met the same neighbours."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
