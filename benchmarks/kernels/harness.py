"""Checks, times and reports operators; ``bench_<op>.py`` says only what to run. Runs on a GPU and on a CPU.

A benchmark names its sizes and builds one case of each::

    from harness import Bench, Case, main, pytest_entry
    from kinetok.kernels.norm import reference, rms_norm

    def build(size: tuple[int, int], device: torch.device) -> Case:
        rows, width = size
        x = torch.randn(rows, width, device=device, dtype=half(device))
        w = torch.randn(width, device=device, dtype=half(device))
        return Case(
            args=(x, w), ours=rms_norm, eager=reference.rms_norm, library={"F.rms_norm": f_rms_norm},
            moved=2 * x.nbytes + w.nbytes, tolerance=1e-2,
        )

    RMS_NORM = Bench("rms_norm", {"default, 64 rows": (64, 192), "7B, 8192 rows": (8192, 4096)}, build)
    test_norm = pytest_entry(RMS_NORM)          # pytest benchmarks/kernels --benchmark-only
    if __name__ == "__main__":
        main(RMS_NORM)                          # python bench_norm.py --json FILE [--quick] [--device cpu] [--no-compile]

Each route is a function of ``args``. Ours is checked first, on memory filled with NaN, against ``exact`` (by default the
eager route on float64 copies of ``args``); where that fails, the row has times and the word FAILED, no rate, no ratio,
and the program exits with 1. The routes take turns, caches flushed before every run, and a ratio is the median over the
turns. A share is that of the copy bandwidth (bytes read plus written) or of the matrix product's rate, as measured on this
device in the same process.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinetok.files import whole_file
from kinetok.runtime.bench.clock import Clock, copy_bandwidth, matmul_rate, this_device
from kinetok.runtime.bench.machine import machine

SCHEMA = 1
PERCENTILES = (20, 50, 80)
Route = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at one size.

    ``moved`` is the fewest bytes it must move (each input read once, each output written once), ``work`` the floating-point
    operations its products execute (0: bound by memory), ``rate`` the dtype of those products. ``library`` holds the
    best routes of others by name. ``tolerance`` bounds ||ours - exact|| / ||exact|| of every output; integer outputs may
    differ in that share of places (0: none). ``graph`` captures each route in a CUDA graph, as the decode loop does.
    ``compiled`` False leaves torch.compile out, for routes that it cannot take whole.
    """

    args: tuple[Any, ...]
    ours: Route
    eager: Route
    moved: int
    tolerance: float
    exact: Route | None = None
    library: Mapping[str, Route] = field(default_factory=dict)
    work: int = 0
    rate: torch.dtype = torch.bfloat16
    graph: bool = False
    compiled: bool = True


@dataclass(frozen=True)
class Bench:
    """An operator and its sizes by name; ``cpu`` and ``quick`` name those for a CPU (default all) and for --quick (first)."""

    op: str
    sizes: Mapping[str, Any]
    build: Callable[[Any, torch.device], Case]
    cpu: Collection[str] | None = None
    quick: Collection[str] | None = None

    def names(self, device: torch.device, quick: bool = False) -> list[str]:
        fits = [name for name in self.sizes if device.type == "cuda" or self.cpu is None or name in self.cpu]
        return [name for name in fits if name in (self.quick or fits[:1])] if quick else fits


def half(device: torch.device) -> torch.dtype:
    """The dtype to measure in: bf16 on a GPU, fp32 on a CPU, as the models run there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def percentiles(times: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {f"p{p}": cuts[p - 1] for p in PERCENTILES}


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]


def _exact(case: Case) -> list[Tensor]:
    if case.exact is not None:
        return _tensors(case.exact(*case.args))
    up = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.args)
    return _tensors(case.eager(*up))


def check(case: Case) -> dict[str, Any]:
    """Whether ours agrees with ``exact``: {"passed", "error", "tolerance"}; NaN, a wrong shape or count never pass."""
    wanted = [t.clone() for t in _exact(case)]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every torch.empty with NaN
    try:
        got = _tensors(case.ours(*case.args))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    error = 0.0 if len(got) == len(wanted) else float("inf")
    for a, b in zip(got, wanted, strict=False):
        if a.shape != b.shape or not b.numel():
            error = float("inf")
        elif b.is_floating_point():
            one = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
            error = max(error, one if one == one else float("inf"))
        else:
            error = max(error, float((a != b).double().mean()))
    passed = error <= case.tolerance
    return {"passed": passed, "error": error if error < float("inf") else None, "tolerance": case.tolerance}


def _graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _routes(case: Case, device: torch.device, compiled: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The routes to time by name, and why others are left out: a library that fails here must not cost ours its row."""
    functions: dict[str, Route] = {"ours": case.ours, "eager": case.eager}
    if compiled and case.compiled:
        functions["torch.compile"] = torch.compile(case.eager, dynamic=False)
    functions |= case.library

    def bind(function: Route) -> Callable[[], Any]:
        return lambda: function(*case.args)

    calls: dict[str, Callable[[], Any]] = {}
    left_out: dict[str, str] = {}
    for name, call in {name: bind(function) for name, function in functions.items()}.items():
        try:
            call()  # compiles
            calls[name] = _graphed(call) if device.type == "cuda" and case.graph else call
        except Exception as error:
            if name in ("ours", "eager"):
                raise
            left_out[name] = f"{type(error).__name__}: {error}"[:200]
    return calls, left_out


def measure(
    bench: Bench, name: str, device: torch.device, *, seconds: float = 0.5, compiled: bool = True
) -> dict[str, Any]:
    """One row: the check, milliseconds of each route, our rate, its share of the limit, and how much faster ours is."""
    torch.manual_seed(0)
    torch.compiler.reset()
    case = bench.build(bench.sizes[name], device)
    verdict = check(case)
    routes, left_out = _routes(case, device, compiled)
    times = Clock(device).all(routes, seconds)
    spread = {route: percentiles(values) for route, values in times.items()}
    row: dict[str, Any] = {"op": bench.op, "size": name, "check": verdict, "repeats": len(times["ours"])}
    row["ms"] = {route: {p: 1e3 * value for p, value in cuts.items()} for route, cuts in spread.items()}
    row |= {"gb_per_s": None, "tflop_per_s": None, "limits": {}, "bound": None, "share_of_limit": None}
    row["faster_than"] = {}
    measured = [route for route in case.library if route in spread]
    row |= {"best_library": min(measured, key=lambda route: spread[route]["p50"], default=None), "left_out": left_out}
    if verdict["passed"]:
        own = spread["ours"]["p50"]
        row["limits"] = {"copy_gb_per_s": copy_bandwidth(device) / 1e9}
        floors = {"copy": case.moved / copy_bandwidth(device)}
        row["gb_per_s"] = case.moved / own / 1e9
        if case.work:
            row["limits"]["matmul_tflop_per_s"] = matmul_rate(device, case.rate) / 1e12
            floors["matmul"] = case.work / matmul_rate(device, case.rate)
            row["tflop_per_s"] = case.work / own / 1e12
        row["bound"] = max(floors, key=lambda bound: floors[bound])
        row["share_of_limit"] = floors[row["bound"]] / own
        row["faster_than"] = {
            route: statistics.median(theirs / mine for theirs, mine in zip(values, times["ours"], strict=True))
            for route, values in times.items()
            if route != "ours"
        }
    return row


def text_of(row: Mapping[str, Any]) -> str:
    """One line of a row for the screen."""
    ms = row["ms"]["ours"]
    head = f"{row['op']:<22} {row['size']:<28} {ms['p50']:9.4f} ms [{ms['p20']:.4f} {ms['p80']:.4f}]"
    verdict = row["check"]
    if not verdict["passed"]:
        return f"{head}  FAILED: error {verdict['error']}, allowed {verdict['tolerance']:g}"
    rate = f"{row['tflop_per_s']:8.3f} TFLOP/s" if row["bound"] == "matmul" else f"{row['gb_per_s']:8.2f} GB/s"
    ratios = "  ".join(f"{ratio:.2f}x {route}" for route, ratio in row["faster_than"].items())
    ratios += "".join(f"  ({route} left out: {why})" for route, why in row["left_out"].items())
    return f"{head} {rate} = {row['share_of_limit']:.2f} of {row['bound']}  {ratios}  error {verdict['error']:.1e}"


def main(*benches: Bench) -> None:
    """The command line of a benchmark; exits with 1 when a check failed. The file is whole after every row."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="a size or two of each operator, short measurements")
    parser.add_argument("--device", type=torch.device, default=this_device())
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, help="measuring time of each route (0.5; quick 0.1)")
    options = parser.parse_args()
    device: torch.device = options.device
    about = machine(device)
    rows: list[dict[str, Any]] = []
    print(f"{about['device']}: copy {copy_bandwidth(device) / 1e9:.1f} GB/s")
    for bench in benches:
        for name in bench.names(device, options.quick):
            seconds = options.seconds or (0.1 if options.quick else 0.5)
            rows.append(measure(bench, name, device, seconds=seconds, compiled=not options.no_compile))
            print(text_of(rows[-1]), flush=True)
            if options.json:
                with whole_file(options.json) as path:
                    path.write_text(json.dumps({"schema": SCHEMA, "machine": about, "rows": rows}, indent=1) + "\n")
    sys.exit(any(not row["check"]["passed"] for row in rows))


def pytest_entry(*benches: Bench) -> Callable[..., None]:
    """A test that times ours at every size under pytest-benchmark, after the check, and keeps the row in its extra_info."""
    device = this_device()
    sizes = [pytest.param(bench, name, id=f"{bench.op}: {name}") for bench in benches for name in bench.names(device)]

    @pytest.mark.parametrize(("bench", "name"), sizes)
    def test(benchmark: Any, bench: Bench, name: str) -> None:
        row = measure(bench, name, device, seconds=0.1, compiled=False)
        assert row["check"]["passed"], text_of(row)
        print(text_of(row))
        benchmark.extra_info.update(row)
        case = bench.build(bench.sizes[name], device)

        def call() -> None:
            case.ours(*case.args)
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark(call)

    return test
