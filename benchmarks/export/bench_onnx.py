"""Decoding on this CPU: ONNX Runtime beside torch in turns, same weights, same threads.

    python benchmarks/export/bench_onnx.py --json benchmarks/results/onnx_cpu.json

Two decoders: the default model, and one of 111M's shape (12 layers, width 768) with random weights and the default
model's codes and text features, which makes it 109M.
"onnx" is the backend that a CPU gets by default, fp32 from the loaded decoder; int8 and int4 are
bundles (weights; ONNX Runtime also rounds activations to 8 bits). Logits are compared with torch's before anything is timed.
Steps are timed in the middle of a clip that fills the cache. What one must read is every weight of its products once and the
keys and values: those of the whole cache, over which torch and the fp32 graph attend behind a mask, or those that it holds
(int8 and int4). The share is of the bandwidth measured in the same run.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kinetok.export.bundle import export_bundle
from kinetok.files import whole_file
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import decoder_preset
from kinetok.model.pretrained import ModelBundle, build, load_pretrained
from kinetok.runtime.backends import Backend, open_backend
from kinetok.runtime.backends.onnx import ONE_THREAD
from kinetok.runtime.backends.threads import threads_for
from kinetok.runtime.bench.clock import read_bandwidth
from kinetok.runtime.bench.machine import machine

TURNS, STEPS, CAPACITY = 15, 12, 220
TEXT = CAPACITY // 2 - STEPS // 2  # positions before the first timed step
TOLERANCE = {"onnx": 1e-4, "int8": 0.1, "int4": 0.4}  # of the largest logit; random weights are the hardest to round
BYTES = {"torch": 4.0, "onnx": 4.0, "int8": 1 + 4 / 64, "int4": 0.5 + 4 / 32}  # a weight, its block's scale included


def steps(backend: Backend, text: torch.Tensor, rows: int) -> Callable[[], float]:
    """Seconds a step, of ``STEPS`` steps from the same place in a clip each time."""

    def run() -> float:
        backend.prefill(0, text)
        for slot in range(1, rows):
            backend.copy(0, slot)
        token = torch.full((rows,), 3)
        backend.decode(range(rows), token)
        with threads_for(backend):  # as an engine does
            began = time.perf_counter()
            for _ in range(STEPS):
                backend.decode(range(rows), token)
            return (time.perf_counter() - began) / STEPS

    return run


def step_bytes(model: ModelBundle, kind: str, rows: int) -> float:
    config = model.decoder.config
    blocks = sum(p.numel() for block in model.decoder.blocks for p in block.parameters())
    head = config.head_rows * config.n_embd
    read = CAPACITY // 2 if kind in ("int8", "int4") else CAPACITY
    cache = 2 * config.n_layer * config.n_embd * read * 4 * rows
    return blocks * BYTES[kind] + head * BYTES["int8" if kind == "int4" else kind] + cache


def measure(model: ModelBundle, rows: int, bandwidth: float) -> dict[str, dict[str, float]]:
    text = torch.randn(TEXT, model.decoder.config.text_dim, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        names = {"torch": "torch", "onnx": "onnx"}
        for dtype in ("int8", "int4") if rows == 1 else ():
            names[dtype] = f"onnx:{export_bundle(model, Path(folder) / dtype, dtype=dtype, text=False, check=False)}"
        # torch's backend lays the weights out anew, so it gets a decoder of its own.
        own = build(lambda: MotionDecoder(model.decoder.config), torch.device("cpu"), torch.float32)
        own.load_state_dict(model.decoder.state_dict())
        apart = replace(model, decoder=own)
        backends = {
            kind: open_backend(name, apart if kind == "torch" else model, rows, CAPACITY)
            for kind, name in names.items()
        }
        wanted = backends["torch"].prefill(0, text)
        errors = {}
        for kind, backend in backends.items():
            got = [
                b.decode([0], torch.tensor([3]))[0]
                for b in (backend, backends["torch"])
                if b.prefill(0, text) is not None
            ]
            errors[kind] = float((got[0] - got[-1]).abs().max() / wanted.abs().max())
            if errors[kind] > TOLERANCE.get(kind, 0):
                raise SystemExit(f"{kind}: logits differ by {errors[kind]:.3g} of the largest: nothing is timed")
        runs = {kind: steps(backend, text, rows) for kind, backend in backends.items()}
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in range(TURNS):
            for kind, run in runs.items():
                times[kind].append(run())
    found = {}
    for kind, values in times.items():
        moved = step_bytes(model, kind, rows) / statistics.median(values)
        found[kind] = {
            "logit_error": errors[kind],
            "step_ms": 1e3 * statistics.median(values),
            "tokens_per_second": rows / statistics.median(values),
            "gb_per_s": moved / 1e9,
            "share_of_read_bandwidth": moved / bandwidth,
            "times_torch": statistics.median(b / a for a, b in zip(values, times["torch"], strict=True)),
            "times_onnx_fp32": statistics.median(b / a for a, b in zip(values, times["onnx"], strict=True)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--threads", type=int, help="torch's own number without; small decoders take one")
    parser.add_argument("--rows", default="1,16", help="rows at once; a comma list measures each")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    threads = torch.get_num_threads()
    default = load_pretrained(None, "cpu", "float32")
    torch.manual_seed(0)
    own = default.decoder.config
    config = replace(decoder_preset("111M"), text_dim=own.text_dim, codebook=own.codebook)
    wide = replace(default, decoder=MotionDecoder(config).eval(), sampling={})
    rows = []
    for name, model in {"default": default, "111M": wide}.items():
        parameters = sum(p.numel() for p in model.decoder.parameters())
        torch.set_num_threads(1 if parameters < ONE_THREAD else threads)
        read_bandwidth.cache_clear()  # the number of threads has changed
        bandwidth = read_bandwidth(torch.device("cpu"))
        for count in map(int, arguments.rows.split(",")):
            for kind, found in measure(model, count, bandwidth).items():
                row = {
                    "model": name,
                    "parameters": parameters,
                    "rows": count,
                    "threads": torch.get_num_threads(),
                    "route": kind,
                }
                rows.append({**row, "read_gb_per_s": bandwidth / 1e9, **found})
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if arguments.json:
        report = {
            "command": "python benchmarks/export/bench_onnx.py",
            "machine": machine(torch.device("cpu")),
            "rows": rows,
        }
        with whole_file(arguments.json) as part:
            part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
