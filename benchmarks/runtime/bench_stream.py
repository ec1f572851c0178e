"""Streams and a crowd of the default model: ``python benchmarks/runtime/bench_stream.py --json FILE``.

Time from a banked prompt to the first block of frames, time a block after it, the steps of a crowd, and the cost of a step
late in a clip against early. That a crowd's clips are those of characters alone is checked first. Beside the clock on the
wall stands the processor's time, which neighbours on a busy machine do not change.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kinetok
from kinetok.files import whole_file

PROMPT = "a person walks forward"


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds on the wall and of this thread's processor."""
    wall, processor = time.perf_counter(), time.thread_time()
    call()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.thread_time() - processor)


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    walls, processors = zip(*times, strict=True)
    return {
        "wall_ms": {"min": min(walls), "median": statistics.median(walls)},
        "processor_ms": {"min": min(processors), "median": statistics.median(processors)},
        "repeats": len(times),
    }


def clip(engine: kinetok.Engine, handle: int) -> np.ndarray:
    parts = []
    while not (update := engine.poll(handle)).over:
        parts += [] if update.motion is None else [update.motion.features]
        engine.step()
    return np.concatenate([*parts, update.motion.features] if update.motion is not None else parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--characters", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = kinetok.load(options.model, "cpu", characters=max(options.characters))
    next(engine.stream(PROMPT))  # whatever is built once

    handles = [engine.submit(PROMPT, seconds=1, request=request) for request in range(3)]
    together = [clip(engine, handle) for handle in handles]
    for request, frames in enumerate(together):
        if not np.array_equal(frames, clip(engine, engine.submit(PROMPT, seconds=1, request=request))):
            sys.exit("a clip of the crowd is not the clip alone: no speed is reported")

    first, block = [], []
    for seed in range(options.repeats):
        streams = []

        def begin(seed: int = seed, streams: list[Any] = streams) -> None:
            streams.append(engine.stream(PROMPT, seconds=10, seed=seed))
            next(streams[0])

        first.append(timed(begin))
        block += [timed(lambda stream=streams[0]: next(stream)) for _ in range(10)]
    long = engine.stream(PROMPT, seconds=10)
    steps = [timed(lambda: next(long)) for _ in range(150)]
    early, late = (statistics.median(p for _, p in part) for part in (steps[10:40], steps[115:145]))

    rate = engine.model.tokenizer.config.tokens_per_second
    crowds = {}
    for count in options.characters:
        members = [engine.submit(PROMPT, seconds=float("inf"), request=request) for request in range(count)]
        engine.step()

        def once(members: list[int] = members) -> None:
            engine.step()
            for handle in members:
                engine.poll(handle)

        times = [timed(once) for _ in range(5 * options.repeats)]
        crowds[count] = {
            **summary(times),
            "real_time_factor_by_processor": 1e3 / rate / statistics.median(p for _, p in times),
            "share_of_steps_in_real_time_on_the_wall": sum(wall <= 1e3 / rate for wall, _ in times) / len(times),
        }
        for handle in members:
            engine.cancel(handle)
    from kinetok.runtime.bench.machine import machine

    report = {
        "setting": {**machine(torch.device("cpu")), "guidance": engine.model.sampling.get("guidance", 1.0)},
        "step_budget_ms": 1e3 / rate,
        "prompt_to_first_block": summary(first),
        "block": summary(block),
        "block_processor_ms_tokens_115_to_145_over_10_to_40": late / early,
        "crowd_step_and_poll": crowds,
    }
    print(json.dumps(report, indent=1))
    if options.json:
        with whole_file(options.json) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
