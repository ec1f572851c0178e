"""Cached against uncached greedy decoding, side by side: ``python benchmarks/runtime/bench_decode.py --json FILE``.

The uncached route recomputes the whole sequence for each token with logits for all positions, as the reference does.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import decoder_preset


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


@torch.inference_mode()
def cached(decoder: MotionDecoder, text: torch.Tensor, count: int) -> list[int]:
    cache = decoder.new_cache(1, len(text) + count)
    logits = decoder.prefill([text], cache)
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(decoder.decode_step(torch.tensor(tokens[-1:]), cache).argmax()))
    return tokens


@torch.inference_mode()
def uncached(decoder: MotionDecoder, text: torch.Tensor, count: int) -> list[int]:
    tokens: list[int] = []
    mask = torch.ones(1, len(text))
    while len(tokens) < count:
        row = torch.tensor([[decoder.config.pad_id] * len(text) + tokens])
        tokens.append(int(decoder(row, text[None], mask)[0, -1].argmax()))
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="111M")
    parser.add_argument("--tokens", type=int, nargs="+", default=[50, 150])
    parser.add_argument("--text", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    decoder = MotionDecoder(decoder_preset(options.preset)).eval()
    text = torch.randn(options.text, decoder.config.text_dim)
    rows = []
    for count in options.tokens:
        # Random weights may name the end token, which is then just another id: both routes write `count` tokens.
        if cached(decoder, text, count) != uncached(decoder, text, count):
            sys.exit(f"the two routes disagree at {count} tokens: no speed is reported")
        times: dict[str, list[float]] = {"cached": [], "uncached": []}
        for _ in range(options.repeats):
            for name, route in (("cached", cached), ("uncached", uncached)):
                began = time.perf_counter()
                route(decoder, text, count)
                times[name].append(time.perf_counter() - began)
        median = {name: statistics.median(values) for name, values in times.items()}
        rate = {name: count / value for name, value in median.items()}
        ratio = median["uncached"] / median["cached"]
        rows.append({"tokens": count, "tok_per_s": rate, "ratio": ratio, "seconds": times})
        print(
            f"{options.preset} {count} tokens: " + ", ".join(f"{n} {v:.1f} tok/s" for n, v in rate.items()),
            f"{ratio:.2f}x",
        )
    if options.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        setting = {
            "preset": options.preset,
            "text": options.text,
            "threads": options.threads,
            "dtype": "float32",
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit,
        }
        options.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
