"""``kinetok bench stream`` and ``crowd``: an engine as a game drives it, frames as they come, many characters at once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.config import FRAME_RATE, TokenizerConfig
from kinetok.model.presets import decoder_preset
from kinetok.model.pretrained import ModelBundle, load_pretrained
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.runtime.bench.clock import Memory, spread
from kinetok.runtime.bench.decode import characters
from kinetok.runtime.bench.machine import machine
from kinetok.runtime.bench.record import Row, report
from kinetok.runtime.bench.routes import DTYPES, random_decoder
from kinetok.runtime.engine import Engine
from kinetok.runtime.sampling import TRAINED_SECONDS

PROMPT = "a person walks forward"


class _RandomText:
    """Features of the right shape for a model with random weights, whatever the text."""

    bank = None

    def __init__(self, length: int, dim: int) -> None:
        self.features = torch.randn(length, dim, generator=torch.Generator().manual_seed(1))

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        return [self.features for _ in texts]


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveSettings:
    """What to measure: a preset's shape with random weights, "default" or ``model``: a model directory.

    seconds: length of a stream or of a crowd's clips. characters: crowds to measure. text: positions of random text.
    """

    preset: str = "default"
    model: str | None = None
    device: torch.device
    dtype: str = "fp32"
    seconds: float = 6.0
    characters: Sequence[int] = (1, 8)
    text: int = 20
    repeats: int = 5
    note: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.repeats < 5 or min(self.characters, default=0) < 1 or self.text < 1:
            raise UserError("expected at least 5 repeats, one character and one text position")
        if not 0.2 <= self.seconds <= TRAINED_SECONDS:
            raise UserError(f"seconds: expected 0.2 to {TRAINED_SECONDS:g}, got {self.seconds!r}")


def engine_of(settings: LiveSettings, characters: int) -> Engine:
    device, dtype = settings.device, DTYPES[settings.dtype]
    if settings.model is not None or settings.preset == "default":
        return Engine(load_pretrained(settings.model, device, dtype), characters=characters, queue=2 * characters)
    config = decoder_preset(settings.preset)
    torch.manual_seed(0)
    with device:
        tokenizer = MotionTokenizer(TokenizerConfig()).eval()
    bundle = ModelBundle(
        tokenizer=tokenizer,
        decoder=random_decoder(config, device, dtype),
        mean=np.zeros(272),
        std=np.full(272, 0.01),
        offsets=np.asarray(CANONICAL_OFFSETS),
        text_encoder={"type": "none", "name": "random"},
        sampling={},
        provenance={},
        licence="none",
        bank=None,
        directory=Path(settings.preset),
    )
    engine = Engine(bundle, characters=characters, queue=2 * characters)
    engine.text = _RandomText(settings.text, config.text_dim)  # type: ignore[assignment]
    return engine


def _row(settings: LiveSettings, kind: str, batch: int, tokens: int, **figures: Any) -> Row:
    return {
        "kind": kind,
        "model": settings.model or settings.preset,
        "dtype": settings.dtype,
        "batch": batch,
        "tokens": tokens,
        "route": "ours",
        "threads": torch.get_num_threads() if settings.device.type == "cpu" else 0,
        **figures,
    }


def _finish(about: dict[str, Any], settings: LiveSettings, engine: Engine, rows: list[Row]) -> dict[str, Any]:
    parameters = engine.describe()["parameters"]
    dtype = DTYPES[settings.dtype]
    return report(about, settings.device, dtype, note=settings.note, parameters=parameters, rows=rows, refused=[])


def stream(settings: LiveSettings, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """One character's frames: ``ttff`` from the call to the first block, ``block`` between two, and how late the latest was.

    real_time_factor: frames made a second over 30.
    """
    about = machine(settings.device)
    began = time.perf_counter()
    engine = engine_of(settings, 1)
    load_s = time.perf_counter() - began
    firsts, between, seconds, frames = [], [], [], 0
    memory = Memory(settings.device)
    for repeat in range(1 + settings.repeats):
        began = time.perf_counter()
        at, frames = [], 0
        with engine.stream(PROMPT, seconds=settings.seconds, seed=repeat) as blocks:
            for block in blocks:
                at.append(time.perf_counter() - began)
                frames += len(block)
        if repeat:  # the first one warms up
            firsts.append(1e3 * at[0])
            between += [1e3 * (b - a) for a, b in pairwise(at)] or [0.0]
            seconds.append(at[-1])
    config = engine.model.tokenizer.config
    tokens = frames // config.frames_per_token
    median = sorted(seconds)[len(seconds) // 2]
    row = _row(
        settings,
        "stream",
        1,
        tokens,
        load_s=load_s,
        output_throughput=tokens / median,
        frames_per_s=frames / median,
        real_time_factor=frames / median / FRAME_RATE,
        **spread("ttff", firsts),
        **spread("block", between),
        block_frames=config.frames_per_token,
        seconds=seconds,
        **memory.read(),
    )
    tell(
        f"{row['model']} {row['dtype']} stream of {settings.seconds:g} s: first frame {row['median_ttff_ms']:.1f} ms, "
        f"block of {row['block_frames']} frames {row['median_block_ms']:.2f} / {row['p99_block_ms']:.2f} ms, "
        f"{row['real_time_factor']:.1f} times real time"
    )
    return _finish(about, settings, engine, [row])


def crowd(settings: LiveSettings, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Many characters: ``itl`` is a step of everyone, their frames read in it, ``ttft`` the first, prompts prefilled."""
    about = machine(settings.device)
    rows: list[Row] = []
    for count in settings.characters:
        began = time.perf_counter()
        engine = engine_of(settings, count)
        load_s = time.perf_counter() - began
        memory = Memory(settings.device)
        firsts, steps, seconds, written = [], [], [], 0
        for repeat in range(1 + settings.repeats):
            began = mark = time.perf_counter()
            handles = [engine.submit(PROMPT, seconds=settings.seconds, seed=repeat, request=i) for i in range(count)]
            times, written = [], 0
            while handles:
                written += engine.step()
                handles = [handle for handle in handles if not engine.poll(handle).over]
                mark, before = time.perf_counter(), mark
                times.append(1e3 * (mark - before))
            if repeat:
                firsts.append(times[0])
                steps += times[1:]
                seconds.append(mark - began)
        config = engine.model.tokenizer.config
        tokens = round(settings.seconds * config.tokens_per_second)
        median = sorted(seconds)[len(seconds) // 2]
        row = _row(
            settings,
            "crowd",
            count,
            tokens,
            load_s=load_s,
            output_throughput=count * tokens / median,
            real_time_factor=tokens / median / config.tokens_per_second,
            **spread("ttft", firsts),
            **spread("itl", steps),
            seconds=seconds,
            **memory.read(),
        )
        rows.append(row)
        tell(
            f"{row['model']} {row['dtype']} crowd of {count}: {row['output_throughput']:.0f} tok/s, "
            f"step {row['median_itl_ms']:.2f} / {row['p99_itl_ms']:.2f} ms, {row['real_time_factor']:.1f} times real time"
        )
    return {**_finish(about, settings, engine, rows), "characters_in_real_time": characters(rows)}
