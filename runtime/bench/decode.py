"""``kinetok bench decode``: a clip's tokens by kinetok and by its peers, in turns, same weights, same tokens."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.config import TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import decoder_preset
from kinetok.model.pretrained import load_pretrained
from kinetok.runtime.bench.clock import Marks, Memory, copy_bandwidth, matmul_rate, read_bandwidth, spread
from kinetok.runtime.bench.machine import machine
from kinetok.runtime.bench.record import Row, report
from kinetok.runtime.bench.routes import (
    DTYPES,
    Backended,
    CannotRun,
    Compiled,
    Graph,
    HuggingFace,
    Uncached,
    fits,
    random_decoder,
)

PEERS = ("uncached", "hf", "compile", "graph", "ort")
DEADLINES_MS = (16.6, 66.7)  # a frame of a 60 Hz game; a token of the released tokenizer
# Logits nearer than this are a near tie, which rounding may decide either way: the products of half precision alone
# move a logit of a few units by that much.
MARGINS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """What to measure: a preset's shape with random weights, "default" or ``model``: a model directory.

    onnx: the bundle of the same weights that the peer ort runs.
    """

    preset: str = "111M"
    model: str | None = None
    device: torch.device
    dtype: str = "fp32"
    batch: Sequence[int] = (1,)
    tokens: Sequence[int] = (50, 150)
    text: int = 20
    repeats: int = 5
    peers: Sequence[str] = ()
    onnx: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.peers) - set(PEERS))
        if unknown:
            raise UserError(f"unknown peers {unknown}: expected some of {', '.join(PEERS)}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.repeats < 5:
            raise UserError(f"repeats: expected at least 5, got {self.repeats}")
        if min(self.batch, default=0) < 1 or min(self.tokens, default=0) < 2 or self.text < 1:
            raise UserError("expected a batch of at least 1, at least 2 tokens and at least 1 text position")


def load(
    preset: str, model: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[MotionDecoder, TokenizerConfig]:
    """The decoder to measure and the tokenizer's sizes; random weights unless they come from a model directory."""
    if model is not None or preset == "default":
        bundle = load_pretrained(model, device, dtype)
        return bundle.decoder, bundle.tokenizer.config
    return random_decoder(decoder_preset(preset), device, dtype), TokenizerConfig()


def _product_weights(decoder: MotionDecoder) -> int:
    """Weights that a step reads whatever the batch, the norms' scales with them."""
    return sum(p.numel() for block in decoder.blocks for p in block.parameters()) + decoder.head.weight.numel()


def step_bytes(decoder: MotionDecoder, batch: int, keys: float) -> float:
    """The fewest bytes of one step: each weight once, the embeddings' rows, and ``keys`` positions of keys and values."""
    config, size = decoder.config, decoder.embed.weight.element_size()
    return size * (_product_weights(decoder) + config.n_embd + batch * config.n_embd * (1 + 2 * config.n_layer * keys))


def step_work(decoder: MotionDecoder, batch: int, keys: float) -> float:
    """Floating-point operations of one step."""
    config = decoder.config
    return 2.0 * batch * (_product_weights(decoder) + 2 * config.n_layer * config.n_embd * keys)


@torch.inference_mode()
def agree(decoder: MotionDecoder, features: Tensor, ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Whether two routes wrote the same tokens; where a row first differs, the two must be a near tie in our logits."""
    margin = 0.0
    distinct = len(torch.unique(ours))
    if ours.shape != theirs.shape:
        return {"passed": False, "near_ties": 0, "margin": None, "distinct_tokens": distinct}
    ties = 0
    for row in range(len(ours)):
        apart = (ours[row] != theirs[row]).nonzero()
        if not len(apart):
            continue
        at = int(apart[0])
        prefix = torch.cat((ours.new_full((features.shape[1],), decoder.config.pad_id), ours[row, :at]))
        logits = decoder(prefix[None], features[row : row + 1], features.new_ones(1, features.shape[1]))[0, -1].float()
        margin = max(margin, float((logits[ours[row, at]] - logits[theirs[row, at]]).abs()))
        ties += 1
    return {
        "passed": margin <= MARGINS[decoder.embed.weight.dtype],
        "near_ties": ties,
        "margin": margin,
        "distinct_tokens": distinct,
    }


def route(name: str, decoder: MotionDecoder, batch: int, capacity: int, onnx: str = "") -> Any:
    """Ours or a peer, ready for ``batch`` rows of ``capacity`` positions. Raises ``CannotRun`` with the reason."""
    makers: dict[str, Callable[[], Any]] = {
        "ours": lambda: Backended.ours(decoder, batch, capacity),
        "ort": lambda: Backended.onnx(onnx, decoder, batch, capacity),
        "uncached": lambda: Uncached(decoder),
        "hf": lambda: HuggingFace(decoder),
        "compile": lambda: Compiled(decoder),
        "graph": lambda: Graph(decoder, batch, capacity),
    }
    return makers[name]()


def _describe(
    times: Sequence[Sequence[float]], decoder: MotionDecoder, settings: DecodeSettings, batch: int, rate: float
) -> Row:
    """Figures of one route: ``times`` holds, for each repeat, the seconds from its start to each token."""
    device = settings.device
    count = len(times[0])
    between = [1e3 * (b - a) for run in times for a, b in pairwise(run)]
    seconds = [run[-1] for run in times]
    throughput = batch * count / statistics.median(seconds)
    step = statistics.median(between) / 1e3
    # The i-th step attends to the text and i positions of motion.
    keys = settings.text + count / 2
    moved, work = step_bytes(decoder, batch, keys) / step, step_work(decoder, batch, keys) / step
    return {
        "output_throughput": throughput,
        **spread("ttft", [1e3 * run[0] for run in times]),
        **spread("tpot", [1e3 * (run[-1] - run[0]) / (count - 1) for run in times]),
        **spread("itl", between),
        "gb_per_s": moved / 1e9,
        "mbu": moved / copy_bandwidth(device),
        "mbu_read": moved / read_bandwidth(device),
        "mfu": work / matmul_rate(device, decoder.embed.weight.dtype),
        "real_time_factor": throughput / batch / rate,
        "seconds": seconds,
        # Of one step each, at the same place of every repeat: what a step costs early and late in the clip.
        "itl_ms_by_position": [1e3 * statistics.median(run[i] - run[i - 1] for run in times) for i in range(1, count)],
    }


def measure(settings: DecodeSettings, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """The report of all batches and token counts. A peer that writes other tokens, or cannot run, is named with its reason.

    Raises ``UserError`` for sizes that do not fit into the model.
    """
    device, dtype = settings.device, DTYPES[settings.dtype]
    about = machine(device)
    began = time.perf_counter()
    decoder, tokenizer = load(settings.preset, settings.model, device, dtype)
    load_s = time.perf_counter() - began
    for count in settings.tokens:
        fits(decoder.config, settings.text, count)
    name = settings.model or settings.preset
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    rows: list[Row] = []
    refused: list[dict[str, Any]] = []
    for batch in settings.batch:
        generator = torch.Generator(device).manual_seed(1)
        features = torch.randn(batch, settings.text, decoder.config.text_dim, generator=generator, device=device)
        routes: dict[str, Any] = {}
        setup: dict[str, float] = {}
        for peer in ("ours", *settings.peers):
            began = time.perf_counter()
            try:
                made = route(peer, decoder, batch, settings.text + max(settings.tokens), settings.onnx)
            except CannotRun as error:
                refused.append({"route": peer, "batch": batch, "reason": str(error)})
                tell(f"{peer}: cannot run: {error}")
                continue
            routes[peer], setup[peer] = made, time.perf_counter() - began
        for count in settings.tokens:
            found, failed = _turns(routes, decoder, features, count, settings)
            for peer, reason in failed.items():
                refused.append({"route": peer, "batch": batch, "tokens": count, "reason": reason})
                tell(f"{peer}: {reason}")
            for peer, (times, check, first, memory) in found.items():
                row = {
                    "kind": "decode",
                    "model": name,
                    "dtype": "fp32" if peer == "uncached" else settings.dtype,
                    "batch": batch,
                    "tokens": count,
                    "route": peer,
                    "threads": threads,
                    "text": settings.text,
                    "check": check,
                    "load_s": load_s if peer == "ours" else setup[peer],
                    "compile_s": first,
                    **_describe(times, decoder, settings, batch, tokenizer.tokens_per_second),
                    **memory,
                }
                base = found["ours"][0]
                row["ours_is_faster"] = statistics.median(t[-1] / o[-1] for t, o in zip(times, base, strict=True))
                if device.type == "cpu":
                    # The processor's own seconds, which a neighbour at work does not lengthen by being served first.
                    spent = zip(memory["cpu_seconds"], found["ours"][3]["cpu_seconds"], strict=True)
                    row["ours_is_faster_in_cpu_seconds"] = statistics.median(t / o for t, o in spent)
                rows.append(row)
                tell(text_of(row))
        del routes
        gc.collect()
    parameters = sum(p.numel() for p in decoder.parameters())
    found = report(about, device, dtype, note=settings.note, parameters=parameters, rows=rows, refused=refused)
    return {**found, "characters_in_real_time": characters(rows)}


Found = dict[str, tuple[list[list[float]], dict[str, Any], float, dict[str, Any]]]


def _turns(
    routes: Mapping[str, Any], decoder: MotionDecoder, features: Tensor, count: int, settings: DecodeSettings
) -> tuple[Found, dict[str, str]]:
    """Warm up and check each route, then time them in turns, so that a drift or a busy neighbour meets all of them."""
    firsts: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    reference: Tensor | None = None
    for name, writer in routes.items():
        memory = Memory(settings.device)
        marks = Marks(settings.device)
        tokens = writer.run(features, count, marks)
        first = marks.seconds()[-1]
        if reference is None:
            reference = tokens
        check = agree(decoder, features, reference, tokens)
        if check["passed"]:
            firsts[name] = (first, check, memory.read())
        else:
            failed[name] = f"wrote other tokens than ours (margin {check['margin']}); no speed is reported"
    times: dict[str, list[list[float]]] = {name: [] for name in firsts}
    busy: dict[str, list[float]] = {name: [] for name in firsts}
    order = list(firsts)
    for _ in range(settings.repeats):
        for name in order:
            began = time.process_time()
            marks = Marks(settings.device)
            routes[name].run(features, count, marks)
            times[name].append(marks.seconds())
            busy[name].append(time.process_time() - began)
        order.append(order.pop(0))
    found: Found = {}
    for name, (first, check, used) in firsts.items():
        # What the first run took beyond a usual one: compilation, capture, first use.
        extra = max(0.0, first - statistics.median(run[-1] for run in times[name]))
        found[name] = (times[name], check, extra, {**used, "cpu_seconds": busy[name]})
    return found, failed


def characters(rows: Sequence[Row]) -> dict[str, int]:
    """The largest measured batch of ours whose steps keep a deadline 99 times in 100; 0 where none does."""
    return {
        f"{deadline}_ms": max(
            (row["batch"] for row in rows if row["route"] == "ours" and row["p99_itl_ms"] <= deadline), default=0
        )
        for deadline in DEADLINES_MS
    }


def text_of(row: Row) -> str:
    """One line of a row for the screen."""
    ratio = "" if row["route"] == "ours" else f"  ours is {row['ours_is_faster']:.2f}x"
    if ratio and "ours_is_faster_in_cpu_seconds" in row:
        ratio += f" ({row['ours_is_faster_in_cpu_seconds']:.2f}x in CPU seconds)"
    return (
        f"{row['model']} {row['dtype']} batch {row['batch']} tokens {row['tokens']} {row['route']:8} "
        f"{row['output_throughput']:8.1f} tok/s  ttft {row['median_ttft_ms']:.1f} ms  "
        f"itl {row['median_itl_ms']:.2f} / {row['p99_itl_ms']:.2f} ms  "
        f"{row['gb_per_s']:.1f} GB/s, {row['mbu_read']:.2f} of what can be read{ratio}"
    )
