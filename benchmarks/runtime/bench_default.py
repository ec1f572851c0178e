"""The default model on this machine: ``python benchmarks/runtime/bench_default.py --json FILE``.

Sentence to a 6-second clip with the model loaded; process start to the first clip; peak memory of that process.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from kinetok.runtime.bench.machine import cpu_name

FIRST_CLIP = """
import sys
import kinetok
kinetok.load().generate("a person walks forward", seconds=6)
status = open("/proc/self/status").read() if sys.platform == "linux" else ""
print(next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), "0"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    starts, peak = [], 0
    for _ in range(options.repeats):
        began = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", FIRST_CLIP], capture_output=True, text=True, check=True)
        starts.append(time.perf_counter() - began)
        peak = max(peak, int(result.stdout.split()[-1]))

    import torch

    import kinetok

    torch.set_num_threads(options.threads)
    engine = kinetok.load()
    engine.generate("a person runs", seconds=6)
    clips, stages = [], []
    for seed in range(options.repeats):
        began = time.perf_counter()
        engine.generate("a person walks forward", seconds=6, seed=seed)
        clips.append(time.perf_counter() - began)
        stages.append(dict(engine.timings))
    report = {
        "setting": {
            "cpu": cpu_name(),
            "threads": options.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "clip_of_6_s": {"median_s": statistics.median(clips), "seconds": clips, "stages_last": stages[-1]},
        "process_start_to_first_clip": {"median_s": statistics.median(starts), "seconds": starts},
        "peak_memory_mb": peak / 1024,
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
