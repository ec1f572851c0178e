"""Tokens to frames on this CPU: ONNX Runtime beside torch in turns, whole clips and streams, frames compared first.

    python benchmarks/runtime/bench_detokenizer.py --json benchmarks/results/detokenizer_cpu.json

Two tokenizers: the default model's, and the released shape with random weights. A stream's row is one token of each of
so many clips, as a crowd pushes them. One thread, as the engine has for models of these sizes.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinetok.files import whole_file
from kinetok.model.config import TokenizerConfig
from kinetok.model.graphs.detokenizer import DetokenizerExport
from kinetok.model.graphs.live import HeldWeights
from kinetok.model.pretrained import load_pretrained
from kinetok.model.streaming import StreamingDetokenizer
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.features import FEATURES
from kinetok.runtime.backends.onnx_stream import OnnxStreamingDetokenizer
from kinetok.runtime.bench.clock import Clock
from kinetok.runtime.bench.machine import machine

TOLERANCE = 1e-4  # of the largest number of a clip
Calls = dict[str, Callable[[], Any]]


def whole(tokenizer: MotionTokenizer, count: int) -> Calls:
    import onnxruntime

    held = HeldWeights()
    export = DetokenizerExport(tokenizer=tokenizer, mean=np.zeros(FEATURES), std=np.ones(FEATURES))
    graph = export.whole(held).model().SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in held.arrays.values()]
    options.add_external_initializers(list(held.arrays), values)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    tokens = torch.randint(tokenizer.config.codebook, (1, count), generator=torch.Generator().manual_seed(0))
    one, zero = torch.ones(FEATURES), torch.zeros(FEATURES)
    return {
        "torch": torch.inference_mode()(lambda: tokenizer.decode(tokens, one, zero)),
        "onnx": lambda: torch.from_numpy(session.run(["features"], {"tokens": tokens.numpy()})[0]),
    }


def streamed(tokenizer: MotionTokenizer, rows: int) -> Calls:
    tokens = torch.randint(tokenizer.config.codebook, (rows, 1), generator=torch.Generator().manual_seed(0))
    made = {"torch": StreamingDetokenizer(tokenizer, rows), "onnx": OnnxStreamingDetokenizer(tokenizer, rows)}
    for detokenizer in made.values():
        for _ in range(detokenizer.lookahead + 1):  # past what comes before a clip's first frame
            detokenizer.push(range(rows), tokens)
    return {name: lambda one=one: torch.cat(one.push(range(rows), tokens)) for name, one in made.items()}  # type: ignore[misc]


def measure(calls: Calls, seconds: float) -> dict[str, float]:
    theirs, ours = calls["torch"](), calls["onnx"]()
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"frames differ by {error:.3g} of the largest: nothing is timed")
    times = Clock(torch.device("cpu")).all(calls, seconds)
    ratios = [a / b for a, b in zip(times["torch"], times["onnx"], strict=True)]
    return {
        "error": error,
        **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()},
        "times_torch": statistics.median(ratios),
        "repeats": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--seconds", type=float, default=4.0, help="about so long a row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizers = {
        "default": load_pretrained(None, "cpu", "float32").tokenizer,
        "released": MotionTokenizer(TokenizerConfig()).eval(),
    }
    rows = []
    for name, tokenizer in tokenizers.items():
        for kind, make, sizes in (("whole, tokens", whole, (8, 90, 150)), ("stream, clips", streamed, (1, 8, 16))):
            for size in sizes:
                row = {
                    "tokenizer": name,
                    "kind": kind,
                    "size": size,
                    **measure(make(tokenizer, size), arguments.seconds),
                }
                rows.append(row)
                print(
                    f"{name:9} {kind} {size:3}: torch {row['torch_ms']:7.2f} ms, onnx {row['onnx_ms']:7.2f} ms, "
                    f"{row['times_torch']:.2f} times as fast",
                    flush=True,
                )
    if arguments.json:
        with whole_file(arguments.json) as path:
            path.write_text(json.dumps({"machine": machine(torch.device("cpu")), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
