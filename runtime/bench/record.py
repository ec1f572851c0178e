"""Result files of ``kinetok bench``: their form, reading, comparing.

Field names follow vLLM's benchmarks where it has the thing: ``output_throughput`` (tokens a second of all rows together),
``median_ttft_ms`` (start to the first token), ``median_tpot_ms`` (a run's mean time a token after the first) and
``median_itl_ms`` (the time between two tokens), each with mean, std, p95 and p99.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.runtime.bench.clock import copy_bandwidth, matmul_rate, read_bandwidth

FORMAT = "kinetok-bench"
SCHEMA = 1
LEAST_NOISE = 0.03
KEY = ("kind", "model", "dtype", "batch", "tokens", "route", "threads")

Row = dict[str, Any]


def report(
    about: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    note: str,
    parameters: int,
    rows: list[Row],
    refused: list[dict[str, Any]],
) -> dict[str, Any]:
    """A whole report: the machine, its measured limits, the rows, and the peers that could not run."""
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "note": note,
        "machine": dict(about),
        "measured": {
            "copy_gb_per_s": copy_bandwidth(device) / 1e9,
            "read_gb_per_s": read_bandwidth(device) / 1e9,
            "matmul_tflop_per_s": matmul_rate(device, dtype) / 1e12,
        },
        "parameters": parameters,
        "rows": rows,
        "cannot_run": refused,
    }


def quantile_noise(seconds: Sequence[float]) -> float:
    """How far the middle half of the repeats is spread, in units of their median."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / statistics.median(seconds)


def write(path: Path, report: Mapping[str, Any]) -> None:
    try:
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path) -> dict[str, Any]:
    """A result file. ``UserError`` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a result file of kinetok bench, got no JSON") from error
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list) or found.get("format") != FORMAT:
        raise UserError(f"{path}: expected a result file of kinetok bench")
    if found.get("schema") != SCHEMA:
        raise UserError(f"{path}: expected schema {SCHEMA}, got {found.get('schema')!r}; measure anew")
    for row in found["rows"]:
        fine = isinstance(row, dict) and all(isinstance(row.get(key), str | int) for key in KEY)
        seconds = row.get("seconds") if fine else None
        numbers = isinstance(seconds, list) and all(type(x) in (int, float) and x > 0 for x in seconds)
        if not numbers or len(seconds or ()) < 2:
            raise UserError(f"{path}: a row lacks some of {', '.join(KEY)} or its seconds")
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that both files have, with ``ratio`` (above 1: faster now), ``noise`` and whether it is a ``regression``.

    The noise of a row is the middle half's spread of its repeats, relative to their median; two rows differ when their
    medians do by more than both noises together, and by more than 3 %. Raises ``UserError`` when no row is in both.
    """
    old = {tuple(row[key] for key in KEY): row for row in before["rows"]}
    result = []
    for row in after["rows"]:
        key = tuple(row[name] for name in KEY)
        if key not in old:
            continue
        ratio = statistics.median(old[key]["seconds"]) / statistics.median(row["seconds"])
        noise = max(LEAST_NOISE, quantile_noise(old[key]["seconds"]) + quantile_noise(row["seconds"]))
        result.append(
            {**dict(zip(KEY, key, strict=True)), "ratio": ratio, "noise": noise, "regression": ratio < 1 - noise}
        )
    if not result:
        raise UserError(f"the two files have no row in common: a row is named by its {', '.join(KEY)}")
    return result
