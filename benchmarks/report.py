"""Committed results into one page: ``python benchmarks/report.py`` writes docs/benchmarks.md and its plots.

Reads every ``kinetok bench`` report in benchmarks/results. What nobody measured reads "not measured".
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from goals import NOTHING, table
from plots import Points, line_plot

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.runtime.bench.record import read
from kinetok.runtime.bench.schema import FORMAT

ROOT = Path(__file__).parents[1]
HEAD = Path(__file__).with_name("page_head.md")


def reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Every report of ``kinetok bench`` in a folder, by file name; other result files are left alone."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if FORMAT in path.read_text(encoding="utf-8")[:200]:
            found[path.name] = read(path)
    return found


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['model']} {row['dtype']} {row['route']}"


def throughput_by_batch(found: Mapping[str, Any]) -> dict[str, Points]:
    """Of decode rows with the most batches: tokens a second of all rows against the batch."""
    series: dict[str, list[tuple[float, float]]] = {}
    for report in found.values():
        for row in report["rows"]:
            if row["kind"] == "decode":
                series.setdefault(f"{_name(row)}, {row['tokens']} tokens", []).append(
                    (row["batch"], row["output_throughput"])
                )
    return {name: sorted(values) for name, values in series.items() if len(values) > 1}


def latency_by_position(found: Mapping[str, Any], window: int = 10) -> dict[str, Points]:
    """Milliseconds of a step against its position, batch 1, medians over windows; the longest clip of each model."""
    longest: dict[str, Mapping[str, Any]] = {}
    for report in found.values():
        for row in report["rows"]:
            if row["kind"] == "decode" and row["batch"] == 1:
                name = _name(row)
                if name not in longest or row["tokens"] > longest[name]["tokens"]:
                    longest[name] = row
    series = {}
    for name, row in longest.items():
        steps = row["itl_ms_by_position"]
        series[name] = [
            (row["text"] + at + window / 2, sorted(steps[at : at + window])[len(steps[at : at + window]) // 2])
            for at in range(0, len(steps), window)
        ]
    return series


def roofline(found: Mapping[str, Any]) -> dict[str, Points]:
    """Operations a second against operations a byte, in our own decode rows, under each device's measured limits."""
    series: dict[str, list[tuple[float, float]]] = {}
    limits: dict[str, tuple[float, float]] = {}
    for report in found.values():
        bandwidth, peak = report["measured"]["read_gb_per_s"], 1e3 * report["measured"]["matmul_tflop_per_s"]
        for row in report["rows"]:
            if row["kind"] == "decode" and row["route"] == "ours":
                work = row["mfu"] * peak
                series.setdefault(_name(row), []).append((work / row["gb_per_s"], work))
                limits[report["machine"]["device"]] = bandwidth, peak
    lowest = min((x for values in series.values() for x, _ in values), default=0.0)
    roofs = {
        f"limits measured on {device}": [
            (lowest, lowest * bandwidth),
            (peak / bandwidth, peak),
            (4 * peak / bandwidth, peak),
        ]
        for device, (bandwidth, peak) in limits.items()
    }
    return {**roofs, **{name: sorted(values) for name, values in series.items()}}


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


# Of each kind of row: a heading, and how a cell is made of a row.
Cell = tuple[str, Callable[[Mapping[str, Any]], str]]


def _pair(name: str) -> Cell:
    return f"{name} ms p50 / p99", lambda row: f"{row[f'median_{name}_ms']:.2f} / {row[f'p99_{name}_ms']:.2f}"


def _number(head: str, name: str, form: str = "{:.1f}") -> Cell:
    return head, lambda row: form.format(row[name]) if row.get(name) is not None else ""


def _ratio(head: str, name: str) -> Cell:
    return head, lambda row: "" if row["route"] == "ours" or name not in row else f"{row[name]:.2f}x"


MODEL: Cell = "model", lambda row: f"{row['model']} {row['dtype']}"
MEMORY: Cell = (
    "memory MB",
    lambda row: "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:.0f}",
)
ROUTE = "route", lambda row: row["route"] if row.get("backend") is None else f"{row['route']} ({row['backend']})"
BATCH, TOKENS = _number("batch", "batch", "{}"), _number("tokens", "tokens", "{}")
RATE, REAL = _number("tok/s", "output_throughput"), _number("times real time", "real_time_factor")
SHARES = _number("GB/s", "gb_per_s"), _number("mbu", "mbu", "{:.2f}"), _number("mfu", "mfu", "{:.3f}")
COLUMNS: dict[str, tuple[Cell, ...]] = {
    "decode": (
        *(
            MODEL,
            ROUTE,
            BATCH,
            TOKENS,
            RATE,
            _number("ttft ms", "median_ttft_ms"),
            _number("ttff ms", "median_ttff_ms"),
        ),
        *(_pair("itl"), *SHARES, REAL, MEMORY, _number("compile s", "compile_s")),
        *(_ratio("ours is", "ours_is_faster"), _ratio("in CPU s", "ours_is_faster_in_cpu_seconds")),
    ),
    "step": (
        *(MODEL, ROUTE, _number("kv", "kv", "{}"), BATCH, _number("position", "context", "{}"), _pair("itl"), RATE),
        *(*SHARES, MEMORY, _number("over the first position", "cost_over_first", "{:.3f}")),
    ),
    "stream": (MODEL, ROUTE, _number("ttff ms", "median_ttff_ms"), _pair("block"), RATE, REAL, MEMORY),
    "crowd": (
        *(MODEL, ROUTE, BATCH, _number("ttft ms", "median_ttft_ms"), _number("ramp ms p99", "p99_ramp_ms")),
        *(_pair("itl"), RATE, REAL, MEMORY),
    ),
    "tokenizer": (MODEL, ROUTE, BATCH, TOKENS, _pair("e2el"), _number("frames/s", "frames_per_s", "{:.0f}"), REAL),
}


def _section(name: str, report: Mapping[str, Any]) -> list[str]:
    about, limits = report["machine"], report["measured"]
    threads = sorted({row["threads"] for row in report["rows"]} - {0})
    lines = [
        f"### {name}",
        f"{about['device']}, {f'{threads[0]} threads, ' if threads else ''}torch {about['torch']}, Python "
        f"{about['python']}, commit {about['commit']}; copies {limits['copy_gb_per_s']:.1f} GB/s, reads "
        f"{limits['read_gb_per_s']:.1f} GB/s, multiplies {1e3 * limits['matmul_tflop_per_s']:.0f} GFLOP/s in that run. "
        f"{report['note']}".rstrip(),
        "",
    ]
    for kind in dict.fromkeys(row["kind"] for row in report["rows"]):
        cells = COLUMNS[kind]
        rows = [[cell(row) for _, cell in cells] for row in report["rows"] if row["kind"] == kind]
        lines += _table(rows, [head for head, _ in cells])
    for name, count in report.get("characters_in_real_time", {}).items():
        lines.append(
            f"\nCharacters whose steps keep {name.replace('_', ' ')} 99 times in 100, of those measured: {count}."
        )
    for route, reason in dict.fromkeys((peer["route"], peer["reason"]) for peer in report["cannot_run"]):
        lines.append(f"\n{route} did not run: {reason}.")
    return [*lines, ""]


def page(found: Mapping[str, dict[str, Any]], images: Path) -> str:
    """The page's text; writes the plots that there are points for."""
    lines = [
        "# Benchmarks",
        "",
        HEAD.read_text(encoding="utf-8").rstrip(),
        "",
        "## Goals",
        *_table(table(found), ("where", "what", "goal", "measured", "met")),
        "",
    ]
    plots = (
        (
            "throughput_by_batch",
            "Throughput against batch",
            "batch",
            "tokens a second",
            throughput_by_batch(found),
            True,
        ),
        (
            "latency_by_position",
            "A step against its position",
            "position",
            "ms a step",
            latency_by_position(found),
            False,
        ),
        ("roofline", "Roofline of the decode step", "operations a byte", "GFLOP/s", roofline(found), True),
    )
    images.mkdir(parents=True, exist_ok=True)
    for file, title, x_name, y_name, series, marks in plots:
        lines.append(f"## {title}")
        if series:
            with whole_file(images / f"{file}.svg") as path:
                path.write_text(line_plot(title, x_name, y_name, series, marks=marks), encoding="utf-8")
            lines += [f"![{title}](images/benchmarks/{file}.svg)", ""]
        else:
            lines += [NOTHING, ""]
    lines.append("## Results")
    for name, report in found.items():
        lines += _section(name, report)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    try:
        text = page(reports(options.results), options.out.parent / "images" / "benchmarks")
    except UserError as error:
        sys.exit(f"report.py: {error}")
    with whole_file(options.out) as path:
        path.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
