"""Result files of ``kinetok bench``: their form, reading, comparing.

Field names follow vLLM's benchmarks where it has the thing (docs/benchmarks.md lists all): ``output_throughput`` (tokens a
second of all rows together), ``median_ttft_ms`` (start to the first token), ``median_tpot_ms`` (a run's mean time a token
after the first), ``median_itl_ms`` (the time between two tokens) and ``median_e2el_ms`` (a whole clip), each with mean, std,
p50, p95 and p99.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.runtime.bench.clock import copy_bandwidth, matmul_rate, read_bandwidth
from kinetok.runtime.bench.machine import machine
from kinetok.runtime.bench.schema import FORMAT, KEY, REPORT, VERSION, violation

LEAST_NOISE = 0.03

Row = dict[str, Any]
Tell = Callable[[str], None]
Save = Callable[[Mapping[str, Any]], None]


def unsaved(report: Mapping[str, Any]) -> None:
    """The ``Save`` of somebody who wants no file."""


class Report:
    """A report as it grows: the machine and its measured limits, rows, and the routes that could not run.

    tell gets a line for the screen of each row and refusal; save the whole report whenever ``keep`` is called.
    """

    def __init__(self, device: torch.device, floats: torch.dtype, note: str, tell: Tell, save: Save) -> None:
        self.about = machine(device)  # before anything is measured: others' work at the start
        self.device, self.floats, self.note = device, floats, note
        self.tell, self.save = tell, save
        self.parameters = 0
        self.rows: list[Row] = []
        self.refused: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {}

    def add(self, row: Row, line: str) -> None:
        self.rows.append(row)
        self.tell(line)

    def refuse(self, **what: Any) -> None:
        """Keep why a route has no figures: its route, batch and reason, and more."""
        self.refused.append(what)
        self.tell(f"{what['route']} batch {what['batch']}: {what['reason']}")

    def keep(self) -> None:
        self.save(self.whole())

    def whole(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schema": VERSION,
            "note": self.note,
            "machine": self.about,
            "measured": {
                "copy_gb_per_s": copy_bandwidth(self.device) / 1e9,
                "read_gb_per_s": read_bandwidth(self.device) / 1e9,
                "matmul_tflop_per_s": matmul_rate(self.device, self.floats) / 1e12,
            },
            "parameters": self.parameters,
            "rows": self.rows,
            "cannot_run": self.refused,
            **self.more,
        }


def quantile_noise(seconds: Sequence[float]) -> float:
    """How far the middle half of the repeats is spread, in units of their median."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / statistics.median(seconds)


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report that keeps to the schema; one that does not is a bug of ours."""
    problem = violation(report, REPORT)
    assert problem is None, problem
    try:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path) -> dict[str, Any]:
    """A result file, checked against the schema. ``UserError`` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a result file of kinetok bench, got no JSON") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: expected a result file of kinetok bench")
    if found.get("schema") != VERSION:
        raise UserError(f"{path}: expected schema {VERSION}, got {found.get('schema')!r}; measure anew")
    if (problem := violation(found, REPORT)) is not None:
        raise UserError(f"{path}: {problem}")
    return found


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that both files have, with ``ratio`` (above 1: faster now), ``noise`` and whether it is a ``regression``.

    The noise of a row is the middle half's spread of its repeats, relative to their median; two rows differ when their
    medians do by more than both noises together, and by more than 3 %, of
    the quicker one: however noisy, one that takes many times as long is slower. Raises ``UserError`` when no row is in both.
    """
    old = {key_of(row): row for row in before["rows"]}
    result = []
    for row in after["rows"]:
        key = key_of(row)
        if key not in old:
            continue
        ratio = statistics.median(old[key]["seconds"]) / statistics.median(row["seconds"])
        noise = max(LEAST_NOISE, quantile_noise(old[key]["seconds"]) + quantile_noise(row["seconds"]))
        result.append(
            {**dict(zip(KEY, key, strict=True)), "ratio": ratio, "noise": noise, "regression": ratio * (1 + noise) < 1}
        )
    if not result:
        raise UserError(f"the two files have no row in common: a row is named by its {', '.join(KEY)}")
    return result
