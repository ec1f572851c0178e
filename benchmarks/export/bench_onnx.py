"""Decoding on this CPU: ONNX Runtime beside torch in turns, same threads, one character.

    python benchmarks/export/bench_onnx.py --threads 1 --json benchmarks/results/onnx_cpu.json

Two decoders: the default model, and one of 111M's shape (12 layers, width 768) with the default model's codes and random
weights. Before anything is timed, both sides' logits are compared; fp32 stands against torch at fp32, and int8 and int4
(weights; ONNX Runtime also rounds activations to 8 bits) against the same torch fp32, for want of a torch route.
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
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import ModelBundle, load_pretrained
from kinetok.runtime.backends import Backend
from kinetok.runtime.backends.onnx import OnnxBackend
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.bench.machine import machine
from kinetok.runtime.bundle import read_bundle

TURNS, STEPS, CAPACITY = 15, 12, 220
TOLERANCE = {"fp32": 1e-4, "int8": 0.05, "int4": 0.25}  # of the largest logit


def steps(backend: Backend, text: torch.Tensor) -> Callable[[], float]:
    """Seconds a token, of ``STEPS`` tokens from the same place in a clip each time."""

    def run() -> float:
        backend.prefill(0, text)
        token = torch.tensor([3])
        backend.decode([0], token)
        began = time.perf_counter()
        for _ in range(STEPS):
            backend.decode([0], token)
        return (time.perf_counter() - began) / STEPS

    return run


def measure(model: ModelBundle, dtype: str) -> dict[str, float]:
    text = torch.randn(12, model.decoder.config.text_dim, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        bundle = read_bundle(export_bundle(model, Path(folder) / "bundle", dtype=dtype, text=False, check=False))
        ours, theirs = OnnxBackend(bundle, 1, CAPACITY), TorchBackend(model.decoder, 1, CAPACITY)
        wanted, got = theirs.prefill(0, text), ours.prefill(0, text)
        difference = float((wanted - got).abs().max() / wanted.abs().max())
        if difference > TOLERANCE[dtype]:
            raise SystemExit(f"{dtype}: logits differ by {difference:.3g} of the largest: nothing is timed")
        runs = {"onnx": steps(ours, text), "torch": steps(theirs, text)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(TURNS):
            for name, run in runs.items():
                times[name].append(run())
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratios = [b / a for a, b in zip(times["onnx"], times["torch"], strict=True)]
    return {
        "logit_difference": difference,
        "onnx_tokens_per_second": 1 / middle["onnx"],
        "torch_fp32_tokens_per_second": 1 / middle["torch"],
        "ratio_median": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    default = load_pretrained(None, "cpu", "float32")
    torch.manual_seed(0)
    config = DecoderConfig(n_layer=12, n_head=12, n_embd=768, codebook=default.decoder.config.codebook, text_dim=384)
    wide = MotionDecoder(config).eval()
    models = {"default": default, "111M's shape": replace(default, decoder=wide, sampling={})}
    results = {}
    for name, model in models.items():
        for dtype in TOLERANCE:
            results[f"{name}, {dtype}"] = measure(model, dtype)
            print(f"{name}, {dtype}:", {k: round(v, 4) for k, v in results[f"{name}, {dtype}"].items()}, flush=True)
    parameters = {name: sum(p.numel() for p in model.decoder.parameters()) for name, model in models.items()}
    if arguments.json:
        report = {"results": results, "parameters": parameters, "machine": machine(torch.device("cpu"))}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
