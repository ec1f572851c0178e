"""Committed results into one page: ``python benchmarks/report.py`` writes docs/benchmarks.md and its plots.

Reads every ``kinetok bench`` report in benchmarks/results. What nobody measured reads "not measured".
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.runtime.bench.record import FORMAT, read

ROOT = Path(__file__).parents[1]
COLOURS = ("#4c8bb5", "#d9a441", "#6b4c8a", "#4f9a5b", "#b5534c", "#777777")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 70, 20, 40, 80
NOTHING = "not measured"
GPU_GOALS = (
    ("7B bf16 batch 1, share of measured copy bandwidth", "at least 0.93"),
    ("7B int8 / int4 batch 1, share of their own floors", "at least 0.86 / 0.79"),
    ("7B against uncached / hf / graph at 150 tokens", "at least 6x / 5x / 1.15x"),
    ("crowd of 64, mean context 170", "at least 9,500 tok/s"),
    ("characters in real time at 66.7 ms", "at least 500 bf16, 1,000 fp8"),
)

Points = Sequence[tuple[float, float]]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on an axis of powers of ten: 1, 2 and 5 times each."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]


def line_plot(title: str, x_name: str, y_name: str, series: Mapping[str, Points], *, marks: bool = True) -> str:
    """Lines over two logarithmic axes as SVG text; a series of one point is a dot."""
    points = [point for values in series.values() for point in values]
    if not points or min(min(point) for point in points) <= 0:
        raise UserError(f"{title}: expected points above zero")

    def limits(values: list[float]) -> tuple[float, float]:
        low, high = min(values), max(values)
        return (low / 1.3, high * 1.3)

    x_low, x_high = limits([x for x, _ in points])
    y_low, y_high = limits([y for _, y in points])

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / x_low) / math.log(x_high / x_low)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(value / y_low) / math.log(y_high / y_low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    for tick in _ticks(x_low, x_high):
        parts.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>'
            f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in _ticks(y_low, y_high):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e4e4e4"/>'
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - BOTTOM + 34}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(
        f'<text x="16" y="{HEIGHT / 2 - 20}" text-anchor="middle" '
        f'transform="rotate(-90 16 {HEIGHT / 2 - 20})">{escape(y_name)}</text>'
    )
    for at, (name, values) in enumerate(series.items()):
        colour = COLOURS[at % len(COLOURS)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in values)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if marks or len(values) == 1:
            parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5" fill="{colour}"/>' for a, b in values]
        across, down = at % 3, at // 3
        left, top = LEFT + across * 215, HEIGHT - 28 + down * 16
        parts.append(
            f'<rect x="{left}" y="{top - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{left + 15}" y="{top}">{escape(name)}</text>'
        )
    return "\n".join((*parts, "</svg>")) + "\n"


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
    """Operations a second against operations a byte, in our own decode rows, under the measured limits of one machine."""
    series: dict[str, list[tuple[float, float]]] = {}
    ridge: tuple[float, float, float] | None = None
    for report in found.values():
        bandwidth, peak = report["measured"]["read_gb_per_s"], 1e3 * report["measured"]["matmul_tflop_per_s"]
        for row in report["rows"]:
            if row["kind"] != "decode" or row["route"] != "ours":
                continue
            work = row["mfu"] * peak
            series.setdefault(_name(row), []).append((work / row["gb_per_s"], work))
            ridge = (bandwidth, peak, peak / bandwidth)
    if ridge is None:
        return {}
    bandwidth, peak, corner = ridge
    lowest = min(x for values in series.values() for x, _ in values)
    roof = [(lowest, lowest * bandwidth), (corner, peak), (4 * corner, peak)]
    return {"limit, measured in the last run": roof, **{name: sorted(values) for name, values in series.items()}}


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _section(name: str, report: Mapping[str, Any]) -> list[str]:
    about, limits = report["machine"], report["measured"]
    kind = report["rows"][0]["kind"] if report["rows"] else ""
    lines = [
        f"### {name}",
        f"{about['device']}, torch {about['torch']}, Python {about['python']}, commit {about['commit']}; "
        f"copies {limits['copy_gb_per_s']:.1f} GB/s, reads {limits['read_gb_per_s']:.1f} GB/s, "
        f"multiplies {1e3 * limits['matmul_tflop_per_s']:.0f} GFLOP/s in that run. {report['note']}",
        "",
    ]
    if kind == "decode":
        head = (
            "model",
            "route",
            "batch",
            "tokens",
            "tok/s",
            "ttft ms",
            "itl ms p50 / p99",
            "GB/s",
            "mbu",
            "ours is",
            "in CPU s",
        )
        rows = [
            (
                f"{row['model']} {row['dtype']}",
                row["route"],
                str(row["batch"]),
                str(row["tokens"]),
                f"{row['output_throughput']:.1f}",
                f"{row['median_ttft_ms']:.1f}",
                f"{row['median_itl_ms']:.2f} / {row['p99_itl_ms']:.2f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['mbu']:.2f}",
                "" if row["route"] == "ours" else f"{row['ours_is_faster']:.2f}x",
                "" if row["route"] == "ours" else _ratio(row.get("ours_is_faster_in_cpu_seconds")),
            )
            for row in report["rows"]
        ]
    elif kind == "tokenizer":
        head = "model", "route", "batch", "tokens", "ms p50 / p99", "frames/s", "times real time"
        rows = [
            (
                row["model"],
                row["route"],
                str(row["batch"]),
                str(row["tokens"]),
                f"{row['median_e2el_ms']:.2f} / {row['p99_e2el_ms']:.2f}",
                f"{row['frames_per_s']:.0f}",
                f"{row['real_time_factor']:.0f}",
            )
            for row in report["rows"]
        ]
    else:
        step = "itl" if kind == "crowd" else "block"
        first = "ttft" if kind == "crowd" else "ttff"
        head = "model", "characters", "first ms", "step ms p50 / p99", "tok/s", "times real time"
        rows = [
            (
                f"{row['model']} {row['dtype']}",
                str(row["batch"]),
                f"{row[f'median_{first}_ms']:.1f}",
                f"{row[f'median_{step}_ms']:.2f} / {row[f'p99_{step}_ms']:.2f}",
                f"{row['output_throughput']:.1f}",
                f"{row['real_time_factor']:.1f}",
            )
            for row in report["rows"]
        ]
    lines += _table(rows, head)
    for peer in report["cannot_run"]:
        lines.append(f"\n{peer['route']} did not run: {peer['reason']}.")
    return [*lines, ""]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def page(found: Mapping[str, dict[str, Any]], images: Path) -> str:
    """The page's text; writes the plots that there are points for."""
    gpus = [report for report in found.values() if "compute_capability" in report["machine"]]
    lines = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/report.py` from the files in `benchmarks/results`. Every peer had to write the same",
        "tokens before it was timed, in turns with ours in one process, on the same weights; `ours is` is the median over the",
        "turns. `mbu` is the share of the bandwidth that a large copy reached in that run, `hf` is Hugging Face's",
        "`LlamaForCausalLM.generate` with a static cache, `uncached` the authors' algorithm. Weights are random except for",
        "the default model's. How to measure your own machine: [CONTRIBUTING](../CONTRIBUTING.md).",
        "",
        "## On a GPU",
        *_table(
            [(what, goal, "see below" if gpus else NOTHING) for what, goal in GPU_GOALS], ("what", "goal", "measured")
        ),
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
