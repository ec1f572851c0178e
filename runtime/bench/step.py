"""``kinetok bench step``: one decode step with the cache filled to given positions, for any number of characters."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.runtime.backends import Backend, DrawingBackend, check_names, open_backend
from kinetok.runtime.backends.threads import threads_for
from kinetok.runtime.bench.checks import greedy
from kinetok.runtime.bench.clock import Marks, Memory, release, spread
from kinetok.runtime.bench.decode import one_line, too_big
from kinetok.runtime.bench.figures import bytes_of, characters, inter_token, median_ratio, name_of, rates
from kinetok.runtime.bench.record import Report, Row, Save, Tell, unsaved
from kinetok.runtime.bench.routes import CannotRun, greedy_draw, own_backend, told
from kinetok.runtime.bench.subject import Subject, activations, check_dtype, load, own_copy


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What to measure: a preset's shape with random weights, "default" or ``model``: a model directory.

    positions: how many positions of text and motion a step sees, on average over the ``steps`` steps of a run.
    """

    preset: str = "111M"
    model: str | None = None
    device: torch.device
    dtype: str = "fp32"
    backend: str | None = None
    kv: str = "auto"
    batch: Sequence[int] = (1,)
    positions: Sequence[int] = (30, 300)
    text: int = 20
    steps: int = 2
    repeats: int = 10
    note: str = ""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_names(self.backend or "auto", self.kv)
        if self.repeats < 5 or self.steps < 2 or min(self.batch, default=0) < 1 or self.text < 1:
            raise UserError("expected at least 5 repeats, 2 steps, a batch of at least 1 and 1 text position")
        least = self.text + self.steps // 2 + 1
        if min(self.positions, default=0) < least:
            raise UserError(f"positions: {self.text} of text and {self.steps} steps need at least {least}")


class Runs:
    """Every character at one position, again and again: a spare slot a position is prefilled and copied into all of them."""

    def __init__(self, backend: Backend, codebook: int, features: Tensor, settings: StepSettings, batch: int) -> None:
        self.backend, self.codebook, self.steps, self.slots = backend, codebook, settings.steps, range(batch)
        self.spare = {position: batch + at for at, position in enumerate(settings.positions)}
        self.given: dict[int, list[int]] = {}
        self.first: dict[int, Tensor] = {}
        for position, slot in self.spare.items():
            # So that the steps lie around the position, behind one that is not timed: it tells the device who takes part.
            count = position - len(features) - self.steps // 2 - 1
            generator = torch.Generator().manual_seed(position)
            self.given[position] = torch.randint(codebook, (count,), generator=generator).tolist()
            self.first[position] = backend.prefill(slot, features, self.given[position])[:codebook].argmax()

    @torch.inference_mode()
    def __call__(self, position: int) -> tuple[list[float], Tensor]:
        """Seconds of each step, and the tokens ``[B, steps + 2]``."""
        for slot in self.slots:
            self.backend.copy(self.spare[position], slot)
        first = self.first[position].expand(len(self.slots)).clone()
        run = self._drawn if isinstance(self.backend, DrawingBackend) else self._decoded
        with threads_for(self.backend):
            marks, tokens = run(first)
        return [ms / 1e3 for ms in inter_token([marks.seconds()])], torch.stack([first, *tokens], 1)

    def _decoded(self, first: Tensor) -> tuple[Marks, list[Tensor]]:
        tokens, marks = [first], Marks(self.backend.device)
        for _ in range(1 + self.steps):
            tokens.append(self.backend.decode(self.slots, tokens[-1])[:, : self.codebook].argmax(-1))
            marks()
        return marks, tokens[1:]

    def _drawn(self, first: Tensor) -> tuple[Marks, list[Tensor]]:
        """Where the device draws, nothing waits for the host, which reads at the end."""
        backend, readings = self.backend, []
        assert isinstance(backend, DrawingBackend)
        for slot, token in zip(self.slots, first.tolist(), strict=True):
            length = backend.lengths[slot]  # type: ignore[attr-defined]  # what the copy made it
            backend.resume([slot], [length], greedy_draw(self.steps + 2), 1, token)
        marks = Marks(backend.device)
        for _ in range(1 + self.steps):
            readings.append(backend.decode_and_draw(self.slots))
            marks()
        return marks, [told(reading, self.slots, backend.device) for reading in readings]


def measure(settings: StepSettings, tell: Tell = print, save: Save = unsaved) -> dict[str, Any]:
    """The report: a row a batch and position, with ``cost_over_first``: the step's time over that at the first position, in
    the same turns. A batch whose memory is not there is named. Raises ``UserError`` for positions beyond the model's."""
    device, floats = settings.device, activations(settings.dtype, settings.device)
    report = Report(device, floats, settings.note, tell, save)
    subject = load(settings.preset, settings.model, device, settings.dtype)
    report.parameters = subject.parameters
    capacity = max(settings.positions) - settings.steps // 2 + settings.steps
    if capacity > subject.plain.config.block_size:
        raise UserError(f"positions: expected at most {subject.plain.config.block_size}, this takes {capacity}")
    for batch in settings.batch:
        release(device)
        try:
            rows = _rows(subject, settings, batch, capacity, report)
        except Exception as error:
            if not (isinstance(error, CannotRun) or too_big(error)):
                raise
            rows = []
            report.refuse(route="ours", batch=batch, reason=one_line(error))
        for row in rows:
            report.add(row, text_of(row))
        # The furthest position is the dearest: who keeps a deadline there keeps it everywhere.
        furthest = [row for row in report.rows if row["context"] == max(settings.positions)]
        report.more = {"characters_in_real_time": characters(furthest)}
        report.keep()
    return report.whole()


def _rows(subject: Subject, settings: StepSettings, batch: int, capacity: int, report: Report) -> list[Row]:
    device, floats = settings.device, activations(settings.dtype, settings.device)
    name = settings.backend or own_backend(subject.model.decoder)
    generator = torch.Generator(device).manual_seed(1)
    config = subject.plain.config
    features = torch.randn(settings.text, config.text_dim, generator=generator, device=device)
    memory = Memory(device)
    slots = batch + len(settings.positions)
    backend = open_backend(name, own_copy(subject.model), slots, capacity, settings.kv)
    kv = backend.slab.dtype  # type: ignore[attr-defined]  # every backend's, though the seam does not ask for it
    runs = Runs(backend, config.codebook, features, settings, batch)
    checks: dict[int, dict[str, Any]] = {}
    for position in settings.positions:
        _, tokens = runs(position)
        given = runs.given[position]
        whole = torch.cat((tokens.new_tensor(given), tokens[0]))[None]
        check = greedy(subject.plain, features[None], whole, given=len(given), kv=kv)
        check["passed"] = check["passed"] and bool((tokens == tokens[:1]).all())
        if check["passed"]:
            checks[position] = check
        else:
            reason = f"at position {position} wrote other tokens than the weights choose (margin {check['margin']})"
            report.refuse(route="ours", batch=batch, reason=reason)
    # Plain weights beside packed ones are here for the check alone.
    spare = bytes_of(subject.plain) if subject.plain is not subject.model.decoder else 0
    used = {name: None if value is None else value - spare for name, value in memory.read().items()}
    times: dict[int, list[list[float]]] = {position: [] for position in checks}
    order = list(checks)
    for _ in range(settings.repeats):
        for position in order:
            times[position].append(runs(position)[0])
        order = order[1:] + order[:1]
    rate = subject.model.tokenizer.config.tokens_per_second
    rows: list[Row] = []
    for position, check in checks.items():
        each = [second for run in times[position] for second in run]
        step = statistics.median(each)
        medians = {at: [statistics.median(run) for run in times[at]] for at in (position, next(iter(checks)))}
        rows.append(
            {
                "kind": "step",
                "model": subject.name,
                "dtype": settings.dtype,
                "kv": name_of(kv),
                "batch": batch,
                "tokens": settings.steps,
                "text": settings.text,
                "context": position,
                "route": "ours",
                "backend": name,
                "threads": torch.get_num_threads() if device.type == "cpu" else 0,
                "check": check,
                "load_s": subject.load_s,
                "output_throughput": batch / step,
                "real_time_factor": 1 / step / rate,
                **spread("itl", [1e3 * value for value in each]),
                **rates(subject.model.decoder, device, floats, batch, position, kv, step),
                "cost_over_first": median_ratio(medians[position], medians[next(iter(checks))]),
                "seconds": [sum(run) for run in times[position]],
                **used,
            }
        )
    return rows


def text_of(row: Row) -> str:
    """One line of a row for the screen."""
    return (
        f"{row['model']} {row['dtype']} kv {row['kv']} step of {row['batch']} at position {row['context']}: "
        f"{row['median_itl_ms']:.2f} / {row['p99_itl_ms']:.2f} ms, {row['output_throughput']:.0f} tok/s, "
        f"{row['gb_per_s']:.1f} GB/s = {row['mbu']:.2f} of copying, {row['cost_over_first']:.3f} times the first position's"
    )
