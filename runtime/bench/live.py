"""``kinetok bench stream`` and ``crowd``: an engine as a game drives it, frames as they come, many characters at once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kinetok.errors import UserError
from kinetok.model.config import FRAME_RATE
from kinetok.runtime.backends import check_names
from kinetok.runtime.bench.clock import Memory, release, spread
from kinetok.runtime.bench.decode import one_line, too_big
from kinetok.runtime.bench.figures import characters, name_of
from kinetok.runtime.bench.record import Report, Row, Save, Tell, unsaved
from kinetok.runtime.bench.routes import own_backend
from kinetok.runtime.bench.subject import Subject, activations, check_dtype, load, random_text
from kinetok.runtime.engine import Engine
from kinetok.runtime.sampling import TRAINED_SECONDS

PROMPT = "a person walks forward"
CHECKED_SECONDS = 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveSettings:
    """What to measure: a preset's shape with random weights, "default" or ``model``: a model directory.

    causal: random weights with a tokenizer that looks at no later token, in place of the released one. seconds: length of a
    stream or of a crowd's clips. characters: crowds to measure. text: positions of the random text of random weights.
    """

    preset: str = "default"
    model: str | None = None
    device: torch.device
    dtype: str = "fp32"
    backend: str | None = None
    kv: str = "auto"
    causal: bool = False
    seconds: float = 6.0
    characters: Sequence[int] = (1, 8)
    text: int = 20
    repeats: int = 5
    note: str = ""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_names(self.backend or "auto", self.kv)
        if self.repeats < 5 or min(self.characters, default=0) < 1 or self.text < 1:
            raise UserError("expected at least 5 repeats, one character and one text position")
        if not CHECKED_SECONDS <= self.seconds <= TRAINED_SECONDS:
            raise UserError(f"seconds: expected {CHECKED_SECONDS:g} to {TRAINED_SECONDS:g}, got {self.seconds!r}")


def engine_of(subject: Subject, settings: LiveSettings, characters: int) -> Engine:
    model = subject.model
    backend = settings.backend or own_backend(model.decoder)
    # Of its window and the text, no more: a cache for all the positions a large model has would leave room for few.
    rate = model.tokenizer.config.tokens_per_second
    random = settings.model is None and settings.preset != "default"
    positions = settings.text + round(settings.seconds * rate) if random else None
    limits: dict[str, Any] = {"characters": characters, "queue": 2 * characters, "positions": positions}
    engine = Engine(model, backend=backend, kv=settings.kv, **limits)
    if random:
        engine.text = random_text(model, settings.text)  # type: ignore[assignment]
    return engine


def clips(engine: Engine, requests: Sequence[int]) -> list[np.ndarray]:
    """Features ``[T, 272]`` of a short clip of each request, all at once."""
    handles = {request: engine.submit(PROMPT, seconds=CHECKED_SECONDS, request=request) for request in requests}
    found: dict[int, list[np.ndarray]] = {request: [] for request in requests}
    while handles:
        engine.step()
        for request, handle in list(handles.items()):
            update = engine.poll(handle)
            if update.error is not None:
                raise UserError(update.error)
            if update.motion is not None:
                found[request].append(update.motion.features)
            if update.over:
                del handles[request]
    return [np.concatenate(found[request]) for request in requests]


def alone_and_together(engine: Engine, count: int) -> dict[str, Any]:
    """Whether the first and the last character of a crowd get, to the bit, the frames that they get alone."""
    together = clips(engine, range(count))
    checked = sorted({0, count - 1})
    alone = [clips(engine, [request])[0] for request in checked]
    return {"passed": all(np.array_equal(together[at], clip) for at, clip in zip(checked, alone, strict=True))}


def _row(
    subject: Subject, settings: LiveSettings, engine: Engine, kind: str, batch: int, tokens: int, **figures: Any
) -> Row:
    kept: torch.dtype = engine._start().scheduler.backend.slab.dtype  # type: ignore[attr-defined]  # as in routes.py
    return {
        "kind": kind,
        "model": subject.name,
        "dtype": settings.dtype,
        "kv": name_of(kept),
        "batch": batch,
        "tokens": tokens,
        "text": len(engine.text.encode([PROMPT])[0]),
        "route": "ours",
        "backend": engine.backend,
        "threads": torch.get_num_threads() if settings.device.type == "cpu" else 0,
        "load_s": subject.load_s,
        **figures,
    }


def _begin(settings: LiveSettings, tell: Tell, save: Save) -> tuple[Report, Subject]:
    report = Report(settings.device, activations(settings.dtype, settings.device), settings.note, tell, save)
    subject = load(settings.preset, settings.model, settings.device, settings.dtype, causal=settings.causal)
    report.parameters = subject.parameters + sum(p.numel() for p in subject.model.tokenizer.parameters())
    return report, subject


def stream(settings: LiveSettings, tell: Tell = print, save: Save = unsaved) -> dict[str, Any]:
    """One character's frames: ``ttff`` from the call to the first block, ``block`` between two.

    real_time_factor: frames made a second over 30. The stream has to be the clip that ``submit`` gives.
    """
    report, subject = _begin(settings, tell, save)
    engine = engine_of(subject, settings, 1)
    memory = Memory(settings.device)
    whole = clips(engine, [0])[0]
    with engine.stream(PROMPT, seconds=CHECKED_SECONDS) as blocks:
        streamed = np.concatenate([block.features for block in blocks])
    if whole.shape != streamed.shape or not np.allclose(whole, streamed, atol=1e-5):
        report.refuse(route="ours", batch=1, reason="the stream is not the clip of the same parameters")
        report.keep()
        return report.whole()
    firsts, between, seconds, busy, frames = [], [], [], [], 0
    for repeat in range(1 + settings.repeats):
        spent, began = time.process_time(), time.perf_counter()
        at, frames = [], 0
        with engine.stream(PROMPT, seconds=settings.seconds, seed=repeat) as blocks:
            for block in blocks:
                at.append(time.perf_counter() - began)
                frames += len(block)
        if repeat:  # the first one warms up
            firsts.append(1e3 * at[0])
            between += [1e3 * (b - a) for a, b in pairwise(at)] or [0.0]
            seconds.append(at[-1])
            busy.append(time.process_time() - spent)
    config = subject.model.tokenizer.config
    tokens = frames // config.frames_per_token
    median = sorted(seconds)[len(seconds) // 2]
    row = _row(
        subject,
        settings,
        engine,
        "stream",
        1,
        tokens,
        check={"passed": True},
        output_throughput=tokens / median,
        frames_per_s=frames / median,
        real_time_factor=frames / median / FRAME_RATE,
        **spread("ttff", firsts),
        **spread("block", between),
        block_frames=config.frames_per_token,
        seconds=seconds,
        cpu_seconds=busy,
        **memory.read(),
    )
    report.add(
        row,
        f"{row['model']} {row['dtype']} stream of {settings.seconds:g} s: first frame {row['median_ttff_ms']:.1f} ms, "
        f"block of {row['block_frames']} frames {row['median_block_ms']:.2f} / {row['p99_block_ms']:.2f} ms, "
        f"{row['real_time_factor']:.1f} times real time",
    )
    report.keep()
    return report.whole()


def crowd(settings: LiveSettings, tell: Tell = print, save: Save = unsaved) -> dict[str, Any]:
    """Many characters: ``itl`` is a step in which everyone gets a token, their frames read in it; ``ramp`` one up to that in
    which the last one got a first token, so that somebody's prompt was prefilled in it; ``ttft`` the first of these.

    A crowd in which somebody's frames are not those of the same character alone gets no figures, and is named.
    """
    report, subject = _begin(settings, tell, save)
    for count in settings.characters:
        release(settings.device)
        try:
            row = _crowd(subject, settings, count)
        except Exception as error:
            if not too_big(error):
                raise
            report.refuse(route="ours", batch=count, reason=one_line(error))
        else:
            if isinstance(row, str):
                report.refuse(route="ours", batch=count, reason=row)
            else:
                report.add(
                    row,
                    f"{row['model']} {row['dtype']} crowd of {count}: {row['output_throughput']:.0f} tok/s, step "
                    f"{row['median_itl_ms']:.2f} / {row['p99_itl_ms']:.2f} ms, {row['real_time_factor']:.1f} times real time",
                )
        report.more = {"characters_in_real_time": characters(report.rows)}
        report.keep()
    return report.whole()


def _crowd(subject: Subject, settings: LiveSettings, count: int) -> Row | str:
    """The row of a crowd, or why it gets none."""
    memory = Memory(settings.device)
    engine = engine_of(subject, settings, count)
    check = alone_and_together(engine, count)
    if not check["passed"]:
        return "a character's frames among the others are not its frames alone; no speed is reported"
    config = subject.model.tokenizer.config
    tokens = round(settings.seconds * config.tokens_per_second)
    firsts, ramp, steps, seconds, busy = [], [], [], [], []
    for repeat in range(1 + settings.repeats):
        spent, began = time.process_time(), time.perf_counter()
        mark = began
        handles = [engine.submit(PROMPT, seconds=settings.seconds, seed=repeat, request=i) for i in range(count)]
        times, moved = [], []
        while handles:
            moved.append(engine.step())
            handles = [handle for handle in handles if not engine.poll(handle).over]
            mark, before = time.perf_counter(), mark
            times.append(1e3 * (mark - before))
        joined = moved.index(count) + 1 if count in moved else len(moved)
        # Those who joined first also leave first, and a step of the rest costs less.
        full = [spent for spent, n in zip(times[joined:], moved[joined:], strict=True) if n == count]
        if not full:
            return f"the first clips end before all have joined; ask for more than {settings.seconds:g} seconds"
        if repeat:
            firsts.append(times[0])
            ramp += times[:joined]
            steps += full
            seconds.append(mark - began)
            busy.append(time.process_time() - spent)
    median = sorted(seconds)[len(seconds) // 2]
    return _row(
        subject,
        settings,
        engine,
        "crowd",
        count,
        tokens,
        check=check,
        output_throughput=count * tokens / median,
        real_time_factor=tokens / median / config.tokens_per_second,
        **spread("ttft", firsts),
        **spread("ramp", ramp),
        **spread("itl", steps),
        seconds=seconds,
        cpu_seconds=busy,
        **memory.read(),
    )
