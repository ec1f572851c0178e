"""``kinetok bench tokenizer``: tokens to frames and frames to tokens, whole clips."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kinetok.errors import UserError
from kinetok.model.config import TokenizerConfig
from kinetok.model.pretrained import load_pretrained
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime.bench.clock import Marks, Memory, matmul_rate, spread
from kinetok.runtime.bench.machine import machine
from kinetok.runtime.bench.record import Row, report


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSettings:
    """What to measure: "released" (the paper's shape, random weights), "default", or ``model``: a model directory."""

    preset: str = "released"
    model: str | None = None
    device: torch.device
    batch: Sequence[int] = (1,)
    tokens: Sequence[int] = (1, 50, 150)
    repeats: int = 20
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


def work_of(tokenizer: MotionTokenizer, call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products of one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@torch.inference_mode()
def measure(settings: TokenizerSettings, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """The report: clips of each length and batch, decoded and encoded. fp32 throughout, as the tokenizer always is."""
    device = settings.device
    about = machine(device)
    began = time.perf_counter()
    tokenizer = load(settings)
    load_s = time.perf_counter() - began
    config = tokenizer.config
    rows: list[Row] = []
    for batch in settings.batch:
        for count in settings.tokens:
            generator = torch.Generator(device).manual_seed(1)
            tokens = torch.randint(config.codebook, (batch, count), generator=generator, device=device)
            shape = batch, count * config.frames_per_token, config.input_dim
            frames = torch.randn(shape, generator=generator, device=device)
            memory = Memory(device)
            for route, call in (
                ("decode", lambda tokens=tokens: tokenizer.decode(tokens)),
                ("encode", lambda frames=frames: tokenizer.encode(frames)),
            ):
                times = []
                for _ in range(2 + settings.repeats):
                    marks = Marks(device)
                    call()
                    marks()
                    times.append(marks.seconds()[0])
                seconds = times[2:]
                median = statistics.median(seconds)
                row = {
                    "kind": "tokenizer",
                    "model": settings.model or settings.preset,
                    "dtype": "fp32",
                    "batch": batch,
                    "tokens": count,
                    "route": route,
                    "threads": torch.get_num_threads() if device.type == "cpu" else 0,
                    "load_s": load_s,
                    "output_throughput": batch * count / median,
                    "frames_per_s": batch * shape[1] / median,
                    "real_time_factor": count / median / config.tokens_per_second,
                    "mfu": work_of(tokenizer, call) / median / matmul_rate(device, torch.float32),
                    **spread("e2el", [1e3 * value for value in seconds]),
                    "seconds": seconds,
                    **memory.read(),
                }
                rows.append(row)
                tell(text_of(row))
    parameters = sum(p.numel() for p in tokenizer.parameters())
    return report(about, device, torch.float32, note=settings.note, parameters=parameters, rows=rows, refused=[])


def text_of(row: Row) -> str:
    """One line of a row for the screen."""
    return (
        f"{row['model']} tokenizer {row['route']} batch {row['batch']} tokens {row['tokens']} "
        f"{row['median_e2el_ms']:.2f} ms  {row['frames_per_s']:.0f} frames/s, {row['real_time_factor']:.0f} times real time, "
        f"mfu {row['mfu']:.2f}"
    )
