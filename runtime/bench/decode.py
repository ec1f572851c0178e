"""``kinetok bench decode``: a clip's tokens by kinetok and by its peers, in turns, same weights, same tokens."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.streaming import StreamingDetokenizer, whole_clip_reason
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime.backends import check_names
from kinetok.runtime.bench.checks import greedy
from kinetok.runtime.bench.clock import Marks, Memory, release, spread
from kinetok.runtime.bench.figures import bytes_of, characters, latencies, median_ratio, name_of, rates
from kinetok.runtime.bench.llama import Compiled, HuggingFace
from kinetok.runtime.bench.record import Report, Row, Save, Tell, unsaved
from kinetok.runtime.bench.routes import Backended, CannotRun, Graph, Uncached, fits, own_backend
from kinetok.runtime.bench.subject import Subject, activations, check_dtype, load

PEERS = ("uncached", "hf", "compile", "graph", "ort")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """What to measure: a preset's shape with random weights, "default" or ``model``: a model directory.

    backend, kv: of ours, None for ``own_backend`` and "auto" for the weights' dtype. onnx: a bundle of the same weights for
    the peer ort, which otherwise runs a graph made in memory. text: positions of text in front of the tokens.
    """

    preset: str = "111M"
    model: str | None = None
    device: torch.device
    dtype: str = "fp32"
    backend: str | None = None
    kv: str = "auto"
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
        check_dtype(self.dtype)
        check_names(self.backend or "auto", self.kv)
        if self.repeats < 5:
            raise UserError(f"repeats: expected at least 5, got {self.repeats}")
        if min(self.batch, default=0) < 1 or min(self.tokens, default=0) < 2 or self.text < 1:
            raise UserError("expected a batch of at least 1, at least 2 tokens and at least 1 text position")


@dataclass(eq=False)
class _Entrant:
    """A route that wrote the right tokens, and what getting there took."""

    route: Any
    check: dict[str, Any]
    setup_s: float
    first_s: float  # of the first run of the longest clip
    memory: dict[str, int | None]
    compile_s: float = 0.0


def make(name: str, subject: Subject, settings: DecodeSettings, batch: int) -> Any:
    """Ours or a peer, ready for ``batch`` rows. Raises ``CannotRun`` with the reason."""
    capacity = settings.text + max(settings.tokens)
    if name == "ours":
        backend = settings.backend or own_backend(subject.model.decoder)
        return Backended.ours(subject.model, backend, batch, capacity, settings.kv)
    if name == "ort":
        return Backended.onnx(subject.model, settings.onnx, batch, capacity)
    if name == "graph":
        return Graph(subject.plain, batch, capacity)
    return {"uncached": Uncached, "hf": HuggingFace, "compile": Compiled}[name](subject.plain)


def _enter(name: str, subject: Subject, settings: DecodeSettings, features: Tensor, memory: Memory) -> _Entrant:
    """Make a route and run it once, with the longest clip first: Llama's cache keeps the longest length it met, so that
    what was compiled for it serves the shorter clips too."""
    began = time.perf_counter()
    made = make(name, subject, settings, len(features))
    setup_s = time.perf_counter() - began
    marks = Marks(subject.device)
    tokens = made.run(features, max(settings.tokens), marks)
    first_s = marks.seconds()[-1]
    # Ours on a CPU and ORT hold weights of their own, the others work on the common ones.
    used = subject.model.decoder if name == "ours" else subject.plain
    own = {"ours": subject.device.type == "cpu", "ort": True, "uncached": settings.dtype != "fp32"}.get(name, False)
    added = memory.added(0 if own else bytes_of(used))
    return _Entrant(made, greedy(subject.plain, features, tokens, kv=made.kv), setup_s, first_s, added)


def _first_frame(tokenizer: MotionTokenizer, batch: int, repeats: int) -> tuple[int, float] | None:
    """How many tokens the first frame needs, and the median seconds from those tokens to frames on the host; None for a
    tokenizer whose first frame needs the whole clip."""
    if whole_clip_reason(tokenizer.config) is not None:
        return None
    slots, times, needed = range(batch), [], 0
    detokenizer = StreamingDetokenizer(tokenizer, batch)
    while not needed or not len(detokenizer.push(slots, torch.zeros(batch, 1, dtype=torch.int64))[0]):
        needed += 1
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(tokenizer.config.codebook, (batch, needed), generator=generator)
    for _ in range(1 + repeats):
        for slot in slots:
            detokenizer.reset(slot)
        began = time.perf_counter()
        for frames in detokenizer.push(slots, tokens):
            frames.cpu()
        times.append(time.perf_counter() - began)
    return needed, statistics.median(times[1:])


def measure(
    settings: DecodeSettings,
    tell: Tell = print,
    save: Save = unsaved,
) -> dict[str, Any]:
    """The report of all batches and token counts; ``save`` gets it after every count. A route that writes other tokens, or
    cannot run, is named with its reason.

    Raises ``UserError`` for sizes that do not fit into the model.
    """
    device = settings.device
    report = Report(device, activations(settings.dtype, device), settings.note, tell, save)
    subject = load(settings.preset, settings.model, device, settings.dtype)
    report.parameters = subject.parameters
    for count in settings.tokens:
        fits(subject.plain.config, settings.text, count)
    start = Memory(device)
    for batch in settings.batch:
        release(device)
        generator = torch.Generator(device).manual_seed(1)
        features = torch.randn(batch, settings.text, subject.plain.config.text_dim, generator=generator, device=device)
        entrants: dict[str, _Entrant] = {}
        for name in ("ours", *settings.peers):
            try:
                # Ours count from the first batch on: what is packed once for all of them is theirs in each.
                memory = Memory(device, start.before if name == "ours" else None)
                entrant = _enter(name, subject, settings, features, memory)
            except CannotRun as error:
                report.refuse(route=name, batch=batch, reason=str(error))
            except Exception as error:
                if name == "ours" and not too_big(error):
                    raise
                report.refuse(route=name, batch=batch, reason=one_line(error))
            else:
                if entrant.check["passed"]:
                    entrants[name] = entrant
                else:
                    report.refuse(route=name, batch=batch, reason=_wrong(entrant.check))
        first = _first_frame(subject.model.tokenizer, batch, settings.repeats)
        for count in sorted(settings.tokens, reverse=True):
            for row in _rows(entrants, subject, settings, features, count, first, report):
                report.add(row, text_of(row))
            report.more = {"characters_in_real_time": characters(report.rows)}
            report.keep()
        del entrants
    return report.whole()


def _wrong(check: Mapping[str, Any]) -> str:
    return f"wrote other tokens than the weights choose (margin {check['margin']}); no speed is reported"


def too_big(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _turns(
    entrants: Mapping[str, _Entrant], subject: Subject, features: Tensor, count: int, repeats: int
) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """Seconds to each token of each run, and the processor's own seconds, in turns, so that a drift or a busy neighbour
    meets all routes."""
    times: dict[str, list[list[float]]] = {name: [] for name in entrants}
    busy: dict[str, list[float]] = {name: [] for name in entrants}
    order = list(entrants)
    for _ in range(repeats):
        for name in order:
            began = time.process_time()
            marks = Marks(subject.device)
            entrants[name].route.run(features, count, marks)
            times[name].append(marks.seconds())
            busy[name].append(time.process_time() - began)
        order = order[1:] + order[:1]
    return times, busy


def _rows(
    entrants: dict[str, _Entrant],
    subject: Subject,
    settings: DecodeSettings,
    features: Tensor,
    count: int,
    first: tuple[int, float] | None,
    report: Report,
) -> list[Row]:
    """Check and time ``count`` tokens of every route. One that writes other tokens now is taken out, and named."""
    device, batch, rate = subject.device, len(features), subject.model.tokenizer.config.tokens_per_second
    longest = count == max(settings.tokens)
    if not longest:  # the first runs wrote the longest ones
        for name in list(entrants):
            route = entrants[name].route
            check = greedy(subject.plain, features, route.run(features, count, lambda: None), kv=route.kv)
            entrants[name].check = check
            if not check["passed"]:
                report.refuse(route=name, batch=batch, tokens=count, reason=_wrong(check))
                del entrants[name]
    times, busy = _turns(entrants, subject, features, count, settings.repeats)
    rows = []
    for name, entrant in entrants.items():
        runs = times[name]
        seconds = [run[-1] for run in runs]
        if longest:
            entrant.compile_s = max(0.0, entrant.first_s - statistics.median(seconds))
        floats = torch.float32 if name == "uncached" else activations(settings.dtype, device)
        kv: torch.dtype | None = entrant.route.kv
        decoder = subject.model.decoder if name == "ours" else entrant.route.decoder
        found = latencies(runs)
        row: Row = {
            "kind": "decode",
            "model": subject.name,
            "dtype": settings.dtype if name == "ours" else name_of(floats),
            "kv": name_of(kv),
            "batch": batch,
            "tokens": count,
            "text": settings.text,
            "route": name,
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "check": entrant.check,
            "load_s": subject.load_s,
            "setup_s": entrant.setup_s,
            "compile_s": entrant.compile_s,
            "total_output_tokens": batch * count,
            "output_throughput": batch * count / statistics.median(seconds),
            "real_time_factor": count / statistics.median(seconds) / rate,
            **found,
            # The i-th step attends to the text and i positions of motion.
            **rates(decoder, device, floats, batch, settings.text + count / 2, kv, found["median_itl_ms"] / 1e3),
            # Of one step each, at the same place of every repeat: what a step costs early and late in the clip.
            "itl_ms_by_position": [
                1e3 * statistics.median(run[i] - run[i - 1] for run in runs) for i in range(1, count)
            ],
            "seconds": seconds,
            **entrant.memory,
            "cpu_seconds": busy[name],
        }
        if name == "ours":
            row["backend"] = settings.backend or own_backend(subject.model.decoder)
        if first is not None and count >= first[0]:
            row["first_frame_tokens"] = first[0]
            row |= spread("ttff", [1e3 * (run[first[0] - 1] + first[1]) for run in runs])
        if "ours" in entrants:
            row["ours_is_faster"] = median_ratio(seconds, [run[-1] for run in times["ours"]])
            if device.type == "cpu":
                # The processor's own seconds, which a neighbour at work does not lengthen by being served first.
                row["ours_is_faster_in_cpu_seconds"] = median_ratio(busy[name], busy["ours"])
        rows.append(row)
    return rows


def text_of(row: Row) -> str:
    """One line of a row for the screen."""
    ratio = f"  ours is {row['ours_is_faster']:.2f}x" if row["route"] != "ours" and "ours_is_faster" in row else ""
    if ratio and "ours_is_faster_in_cpu_seconds" in row:
        ratio += f" ({row['ours_is_faster_in_cpu_seconds']:.2f}x in CPU seconds)"
    frame = f"  ttff {row['median_ttff_ms']:.1f} ms" if "median_ttff_ms" in row else ""
    return (
        f"{row['model']} {row['dtype']} batch {row['batch']} tokens {row['tokens']} {row['route']:8} "
        f"{row['output_throughput']:8.1f} tok/s  ttft {row['median_ttft_ms']:.1f} ms{frame}  "
        f"itl {row['median_itl_ms']:.2f} / {row['p99_itl_ms']:.2f} ms  "
        f"{row['gb_per_s']:.1f} GB/s = {row['mbu']:.2f} of copying{ratio}"
    )
