"""What the operators must reach on a CPU, in one run: ``python benchmarks/kernels/cpu_goals.py --json FILE``.

Each operator against the route it is compared with, in turns, after its check. A machine may be busy with other work:
beside the clock's time, which then also counts waiting, stands the time that the process computed, and a goal is met by
the smaller of the two ratios. Exits with 1 where a check fails or a goal is missed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_fsq import ENCODE, MEASURED
from bench_wavelet import DWT, IDWT
from harness import Bench, check, percentiles

from kinetok.files import whole_file
from kinetok.runtime.bench.machine import machine

SCHEMA = 1
CPU = torch.device("cpu")
FRAMES, CLIPS = "released, 64 x 96 frames", "256 clips of 96, haar"
GOALS: tuple[tuple[Bench, str, str, float | None], ...] = (
    (ENCODE, FRAMES, "one-hot", 10.0),
    (MEASURED, FRAMES, "eager", None),
    (DWT, CLIPS, "PyWavelets", 3.0),
    (DWT, f"{CLIPS}, channels first", "PyWavelets", None),
    (DWT, f"{CLIPS}, 2 levels", "PyWavelets", None),
    (DWT, "256 clips of 96, db2", "PyWavelets", None),
    (IDWT, CLIPS, "PyWavelets", None),
    (IDWT, f"{CLIPS}, channels first", "PyWavelets", None),
)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(bench: Bench, size: str, other: str, goal: float | None, repeats: int) -> dict[str, Any]:
    """A row: the check, milliseconds of both routes by both clocks, and the ratios, medians over the turns."""
    torch.manual_seed(0)
    case = bench.build(bench.sizes[size], CPU)
    routes = {"ours": case.ours, other: {**case.library, "eager": case.eager}[other]}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in routes}
    row: dict[str, Any] = {"op": bench.op, "size": size, "against": other, "check": check(case), "repeats": repeats}
    for turn in range(-1, repeats):  # the first warms up
        for name in sorted(routes, reverse=turn % 2 == 1):
            began = {clock: now() for clock, now in CLOCKS.items()}
            routes[name](*case.args)
            spent = {clock: 1e3 * (now() - began[clock]) for clock, now in CLOCKS.items()}
            if turn >= 0:
                found[name].append(spent)
    row["ms"] = {
        name: {clock: percentiles([turn[clock] for turn in turns]) for clock in CLOCKS} for name, turns in found.items()
    }
    if row["check"]["passed"]:
        pairs = list(zip(found[other], found["ours"], strict=True))
        row["faster"] = {clock: statistics.median(a[clock] / b[clock] for a, b in pairs) for clock in CLOCKS}
        row |= {"goal": goal, "met": None if goal is None else min(row["faster"].values()) >= goal}
    return row


def text_of(row: dict[str, Any]) -> str:
    head = f"{row['op']:<22} {row['size']:<32}"
    if "faster" not in row:
        return f"{head} FAILED: error {row['check']['error']}"
    ratios = ", ".join(f"{ratio:.2f} ({clock})" for clock, ratio in row["faster"].items())
    verdict = "" if row["goal"] is None else f"  goal {row['goal']:g}: {'met' if row['met'] else 'MISSED'}"
    return f"{head} {ratios} times as fast as {row['against']}{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {**machine(CPU), "load_average": os.getloadavg(), "cores": os.cpu_count()}
    rows = []
    for goal in GOALS:
        rows.append(measure(*goal, options.repeats))
        print(text_of(rows[-1]), flush=True)
        if options.json:
            with whole_file(options.json) as path:
                path.write_text(json.dumps({"schema": SCHEMA, "machine": about, "rows": rows}, indent=1) + "\n")
    sys.exit(any(not row["check"]["passed"] or row["met"] is False for row in rows))


if __name__ == "__main__":
    main()
