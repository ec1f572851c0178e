"""What a call of the C++ library costs by the characters in it: docs/cpp.md's table.

python benchmarks/runtime/bench_cpp_cost.py --note "idle" --json benchmarks/results/cost_cpp.json

Builds runtime/cpp, exports the default model in fp32 and int8, and takes turns between both and 1, 2, 4 and 8 characters in a
call, with guidance: one thread, microseconds of its processor time, best and median. "hot" is a call right after one like it,
"cold" the first of a game's frame.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench_npc import ROOT, build, environment

POSITIONS = 170  # as in examples/npc_crowd: a short text and ten seconds of motion
TURNS = 4
PARTS = ("decode", "detokenizer", "draw")


def run(program: Path, bundle: Path, runs: int) -> list[tuple[str, int, list[float]]]:
    """A call a row: hot or cold, characters, microseconds by part."""
    words = [program, bundle, str(POSITIONS), str(runs)]
    said = subprocess.run(words, check=True, env=environment(), capture_output=True, text=True).stdout
    rows = [line.split() for line in said.splitlines()]
    return [(state, int(count), [float(part) for part in parts]) for state, count, *parts in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=80, help="of each kind and precision")
    parser.add_argument("--note", default="", help="what else ran meanwhile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import onnxruntime

    from kinetok.export.bundle import export_bundle
    from kinetok.files import whole_file
    from kinetok.model.pretrained import load_pretrained
    from kinetok.runtime.bench.machine import cpu_name

    program = build(ROOT / "build" / "cpp_cost", "KINETOK_TESTS", "tests/kinetok_cost")
    calls: dict[tuple[str, str, int], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        bundles = {}
        for precision in ("fp32", "int8"):
            model = load_pretrained(None, "cpu", "float32")
            bundles[precision] = export_bundle(model, Path(name) / precision, dtype=precision, text=False, check=False)
        for _ in range(TURNS):
            for precision, bundle in bundles.items():
                for state, count, parts in run(program, bundle, options.runs // TURNS):
                    calls.setdefault((precision, state, count), []).append(parts)
    rows: list[dict[str, Any]] = []
    for (precision, state, count), times in calls.items():
        row: dict[str, Any] = {"precision": precision, "state": state, "characters": count, "runs": len(times)}
        for part, values in zip(PARTS, zip(*times, strict=True), strict=True):
            row[part] = {"best_us": min(values), "p50_us": statistics.median(values)}
        rows.append(row)
        print(f"{precision} {state} {count}: " + ", ".join(f"{part} {row[part]['best_us']:.0f}" for part in PARTS))
    result = {
        "machine": cpu_name(),
        "cores": os.cpu_count(),
        "onnxruntime": onnxruntime.__version__,
        "positions": POSITIONS,
        "load_after": round(os.getloadavg()[0], 1),
        "note": options.note,
        "rows": rows,
    }
    if options.json:
        with whole_file(options.json) as file:
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
