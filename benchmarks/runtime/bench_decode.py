"""Cached against uncached greedy decoding, side by side: ``python benchmarks/runtime/bench_decode.py --json FILE``.

The uncached route recomputes the whole sequence for each token with logits for all positions, as the reference does.
That both write the same tokens is checked in fp32, whatever dtype is timed: in half precision near ties may fall either way.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from machine import machine

from kinetok.files import whole_file
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import decoder_preset


@torch.inference_mode()
def cached(decoder: MotionDecoder, text: torch.Tensor, count: int) -> list[int]:
    cache = decoder.new_cache(1, len(text) + count)
    logits = decoder.prefill([text], cache)
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(decoder.decode_step(torch.tensor(tokens[-1:], device=text.device), cache).argmax()))
    return tokens


@torch.inference_mode()
def uncached(decoder: MotionDecoder, text: torch.Tensor, count: int) -> list[int]:
    tokens: list[int] = []
    mask = torch.ones(1, len(text), device=text.device)
    while len(tokens) < count:
        row = torch.tensor([[decoder.config.pad_id] * len(text) + tokens], device=text.device)
        tokens.append(int(decoder(row, text[None], mask)[0, -1].argmax()))
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="111M")
    parser.add_argument("--tokens", type=int, nargs="+", default=[50, 150])
    parser.add_argument("--text", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = machine(options.device)
    decoder = MotionDecoder(decoder_preset(options.preset)).eval().to(options.device)
    text = torch.randn(options.text, decoder.config.text_dim, device=options.device)
    # Random weights may name the end token, which is then just another id: both routes write as many tokens as asked for.
    for count in options.tokens:
        if cached(decoder, text, count) != uncached(decoder, text, count):
            sys.exit(f"the two routes disagree at {count} tokens: no speed is reported")
    decoder.to(getattr(torch, options.dtype))
    rows = []
    for count in options.tokens:
        cached(decoder, text, 2), uncached(decoder, text, 2)
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
            names = ("preset", "text", "threads", "dtype")
            setting = {**about, **{name: getattr(options, name) for name in names}}
            with whole_file(options.json) as path:
                path.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
