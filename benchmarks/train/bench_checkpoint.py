"""What checksums add to a sharded checkpoint: ``python benchmarks/train/bench_checkpoint.py --gib 2 --json FILE``.

One process writes a part of so many GiB, as a process of a large run does, by turns with torch's own writer and with the
one that counts checksums; then the sums are compared. A round's ratio is of the two that follow each other; processor time
of all threads stands beside it, as a busy machine's clock says little. The 7B's part on each of 40 processes has 2.2 GiB.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from kinetok.files import whole_file
from kinetok.runtime.bench.machine import machine
from kinetok.train.sums import SummedWriter, changed

TENSOR = 1 << 24  # numbers of a tensor, 64 MiB


def timed(work: Callable[[], Any]) -> dict[str, float]:
    began, began_cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}


def compare(folder: Path, writer: SummedWriter) -> None:
    problem = changed(folder, writer.sums)
    assert writer.sums and problem is None, problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is asked")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = {str(at): torch.randn(TENSOR) for at in range(round(options.gib * 2**30 / 4 / TENSOR))}
    rounds = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for number in range(options.rounds + 1):
            usual = FileSystemWriter(Path(name) / "plain", thread_count=1, sync_files=True)
            plain = timed(partial(save, state, storage_writer=usual, no_dist=True))
            writer = SummedWriter(Path(name) / "summed")
            summed = timed(partial(save, state, storage_writer=writer, no_dist=True))
            compared = timed(partial(compare, Path(name) / "summed", writer))
            if number:  # the first one warms up
                rounds.append({"plain": plain, "summed": summed, "compared": compared})
                print(json.dumps(rounds[-1]), flush=True)
    ratios = {
        kind: statistics.median(one["summed"][kind] / one["plain"][kind] for one in rounds)
        for kind in ("seconds", "cpu_seconds")
    }
    size = len(state) * TENSOR * 4
    result = {
        "machine": machine(torch.device("cpu")),
        "bytes": size,
        "rounds": rounds,
        "median_ratio_seconds": ratios["seconds"],
        "median_ratio_cpu_seconds": ratios["cpu_seconds"],
        "compared_bytes_per_cpu_second": size / statistics.median(one["compared"]["cpu_seconds"] for one in rounds),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        with whole_file(options.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
