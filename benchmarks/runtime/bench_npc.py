"""A crowd in C++ at 60 frames a second: how long the game thread is held, what is late. Goal: 8 characters, p99 within 2 ms.

python benchmarks/runtime/bench_npc.py --json benchmarks/results/npc_crowd.json

Builds runtime/cpp, exports the default model in fp32 and int8, and runs the example npc_crowd on each, with its worker thread
and in line. On an idle machine.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGET_MS = 2.0


def build(folder: Path, option: str, program: str) -> Path:
    """A program of runtime/cpp, named by its path in the build; option is CMake's that it needs."""
    subprocess.run(["cmake", "-S", ROOT / "runtime" / "cpp", "-B", folder, f"-D{option}=ON"], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", "2", "--target", Path(program).name], check=True)
    return folder / program


def environment() -> dict[str, str]:
    """Where such a program finds the Python package's ONNX Runtime."""
    import onnxruntime

    library = next((Path(onnxruntime.__file__).parent / "capi").glob("*onnxruntime.so.*"))
    return {**os.environ, "KINETOK_ONNXRUNTIME": str(library), "ORT_DISABLE_TELEMETRY": "1"}


def run(program: Path, bundle: Path, folder: Path, characters: int, seconds: int, inline: bool) -> dict[str, Any]:
    """One run's figures, as the program writes them."""
    words = [
        program,
        bundle,
        folder / "out",
        characters,
        seconds,
        int(1000 * BUDGET_MS),
        "--json",
        folder / "figures.json",
    ]
    subprocess.run([str(word) for word in words + ["--inline"] * inline], check=True, env=environment())
    return dict(json.loads((folder / "figures.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--characters", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from kinetok.export.bundle import export_bundle
    from kinetok.files import whole_file
    from kinetok.model.pretrained import load_pretrained

    program = build(ROOT / "build" / "cpp", "KINETOK_EXAMPLES", "examples/npc_crowd/npc_crowd")
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for precision in ("fp32", "int8"):
            model = load_pretrained(None, "cpu", "float32")
            bundle = export_bundle(model, folder / precision, dtype=precision, text=False, check=False)
            for inline in (False, True):
                figures = run(program, bundle, folder, options.characters, options.seconds, inline)
                met = figures["frame_ms"]["p99"] <= BUDGET_MS and not figures["frames_late"]
                runs.append({"precision": precision, **figures, "met": met})
    load = os.getloadavg()[0]
    result = {"machine": platform.machine(), "cores": os.cpu_count(), "load_after": round(load, 1), "runs": runs}
    for row in runs:
        where, ms = "in line" if row["inline"] else "worker", row["frame_ms"]
        frames = row["frames_late"] + row["frames_shown"]
        print(
            f"{row['precision']} {where}: p50 {ms['p50']} p99 {ms['p99']} ms, late {row['frames_late']} of {frames}, ",
            end="",
        )
        print(f"{row['cores']} cores: {'met' if row['met'] else 'not met'}")
    if options.json:
        with whole_file(options.json) as file:
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
