"""``kinetok bench tokenizer``: tokens to frames and frames to tokens, whole clips."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.config import TokenizerConfig
from kinetok.model.pretrained import load_pretrained
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime.bench.clock import Marks, Memory, matmul_rate, spread
from kinetok.runtime.bench.record import Report, Row, Save, Tell, unsaved
from kinetok.runtime.bench.subject import name_of_model


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSettings:
    """What to measure: "released" (the paper's shape, random weights), "default", or ``model``: a model directory."""

    preset: str = "released"
    model: str | None = None
    device: torch.device
    batch: Sequence[int] = (1,)
    tokens: Sequence[int] = (1, 50, 150)
    repeats: int = 10
    note: str = ""

    def __post_init__(self) -> None:
        if self.preset not in ("released", "default"):
            raise UserError(f"preset: expected released or default, got {self.preset!r}")
        if self.repeats < 5 or min(self.batch, default=0) < 1 or min(self.tokens, default=0) < 1:
            raise UserError("expected at least 5 repeats, a batch of at least 1 and at least 1 token")


def load(settings: TokenizerSettings) -> MotionTokenizer:
    if settings.model is not None or settings.preset == "default":
        return load_pretrained(settings.model, settings.device).tokenizer
    torch.manual_seed(0)
    with settings.device:
        return MotionTokenizer(TokenizerConfig()).eval()


def check_of(tokenizer: MotionTokenizer, exact: MotionTokenizer, route: str, given: Tensor) -> dict[str, Any]:
    """The first clip against the same weights in float64: the frames' relative error, or the share of other tokens."""
    found = getattr(tokenizer, route)(given)[:1].cpu()
    wanted = getattr(exact, route)(given[:1].cpu() if route == "decode" else given[:1].cpu().double())
    if route == "decode":
        margin, allowed = float((found - wanted).norm() / wanted.norm()), 1e-3
    else:  # a number on the edge between two levels may fall either way
        margin, allowed = float((found != wanted).double().mean()), 0.05
    return {"passed": margin <= allowed, "margin": margin}


def work_of(tokenizer: MotionTokenizer, call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products of one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@torch.inference_mode()
def measure(settings: TokenizerSettings, tell: Tell = print, save: Save = unsaved) -> dict[str, Any]:
    """The report: clips of each length and batch, decoded and encoded. fp32 throughout, as the tokenizer always is."""
    device = settings.device
    report = Report(device, torch.float32, settings.note, tell, save)
    began = time.perf_counter()
    tokenizer = load(settings)
    load_s = time.perf_counter() - began
    config, exact = tokenizer.config, copy.deepcopy(tokenizer).to("cpu", torch.float64)
    report.parameters = sum(p.numel() for p in tokenizer.parameters())
    for batch in settings.batch:
        for count in settings.tokens:
            generator = torch.Generator(device).manual_seed(1)
            tokens = torch.randint(config.codebook, (batch, count), generator=generator, device=device)
            shape = batch, count * config.frames_per_token, config.input_dim
            frames = torch.randn(shape, generator=generator, device=device)
            memory = Memory(device)
            for route, given in (("decode", tokens), ("encode", frames)):
                check = check_of(tokenizer, exact, route, given)
                if not check["passed"]:
                    report.refuse(route=route, batch=batch, tokens=count, reason=f"is wrong by {check['margin']}")
                    continue
                call = partial(getattr(tokenizer, route), given)
                times = []
                for _ in range(2 + settings.repeats):
                    marks = Marks(device)
                    call()
                    marks()
                    times.append(marks.seconds()[0])
                seconds = times[2:]
                median = statistics.median(seconds)
                row: Row = {
                    "kind": "tokenizer",
                    "model": settings.preset if settings.model is None else name_of_model(settings.model),
                    "dtype": "fp32",
                    "kv": "none",
                    "batch": batch,
                    "tokens": count,
                    "route": route,
                    "threads": torch.get_num_threads() if device.type == "cpu" else 0,
                    "check": check,
                    "load_s": load_s,
                    "output_throughput": batch * count / median,
                    "frames_per_s": batch * shape[1] / median,
                    "real_time_factor": count / median / config.tokens_per_second,
                    "mfu": work_of(tokenizer, call) / median / matmul_rate(device, torch.float32),
                    **spread("e2el", [1e3 * value for value in seconds]),
                    "seconds": seconds,
                    **memory.read(),
                }
                report.add(row, text_of(row))
            report.keep()
    return report.whole()


def text_of(row: Row) -> str:
    """One line of a row for the screen."""
    return (
        f"{row['model']} tokenizer {row['route']} batch {row['batch']} tokens {row['tokens']} "
        f"{row['median_e2el_ms']:.2f} ms  {row['frames_per_s']:.0f} frames/s, {row['real_time_factor']:.0f} times real time, "
        f"mfu {row['mfu']:.2f}"
    )
