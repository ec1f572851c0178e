"""Packed against padded sequences: ``python benchmarks/train/bench_packing.py --json FILE``.

One forward and backward pass of the same 24 clips (2 to 10 s, captions of 8 to 40 features) in the reference's layout, where
every row is 301 positions long, and packed. Loss and gradients must be the same before anything is timed. Both go through the
same kernels: the padded route's head, too, sees the positions that count alone. Useful tokens are text, motion and end.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic import SyntheticSequences
from torch import Tensor, nn

from kinetok.files import whole_file
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import decoder_preset
from kinetok.runtime.bench.machine import machine
from kinetok.train.decoder import next_token_loss
from kinetok.train.packing import IGNORED, PackedDecoder, pack
from kinetok.train.recipes import decoder_recipe

BATCH, POSITIONS = 24, 301
GOAL = 1.6  # times as many useful tokens a second
Items = list[tuple[Tensor, Tensor]]


def padded(items: Items, config: DecoderConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = torch.full((len(items), POSITIONS), config.pad_id)
    targets = torch.full_like(tokens, IGNORED)
    for row, (text, motion) in enumerate(items):
        start, end = len(text), len(text) + len(motion)
        tokens[row, start:end], tokens[row, end] = motion, config.end_id
        targets[row, start - 1 : end] = tokens[row, start : end + 1]
    features = nn.utils.rnn.pad_sequence([text for text, _ in items], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(text)) for text, _ in items], batch_first=True)
    return tokens, features, mask, targets


def measure(name: str, config: DecoderConfig, turns: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    decoder = MotionDecoder(config).to(device)
    for parameter in decoder.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.02)
    data = SyntheticSequences(codebook=config.codebook, text_dim=config.text_dim)
    clips = np.random.default_rng(1).integers(len(data.lengths), size=BATCH)
    items = [(data.text(int(clip)), data.tokens(int(clip))) for clip in clips]
    tokens, features, mask, targets = (part.to(device) for part in padded(items, config))
    packed, batch = PackedDecoder(decoder), pack(items, config).to(device)

    def by_padding() -> Tensor:
        return next_token_loss(decoder, decoder.states(tokens, features, mask), targets)

    def by_packing() -> Tensor:
        return packed(batch)

    losses, gradients = [], []
    for route in (by_padding, by_packing):
        loss = route()
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
    error = max(float((a - b).norm() / b.norm()) for b, a in zip(*gradients, strict=True))
    passed = abs(losses[0] - losses[1]) < 1e-5 * losses[0] and error < 1e-3
    useful = len(batch.tokens)
    row: dict[str, Any] = {"size": name, "useful": useful, "padded": BATCH * POSITIONS, "losses": losses}
    row |= {"gradient_error": error, "passed": passed, "faster": None}
    if not passed:
        return row
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    for turn in range(turns + 1):
        for key, route in (("padded", by_padding), ("packed", by_packing)):
            decoder.zero_grad(set_to_none=True)
            began, cpu = time.perf_counter(), time.process_time()
            route().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            # On a shared processor its own time is what the work cost; on a GPU the clock on the wall is.
            took = time.perf_counter() - began if device.type == "cuda" else time.process_time() - cpu
            if turn:
                seconds[key].append(took)
    row["seconds"] = {key: statistics.median(values) for key, values in seconds.items()}
    row["useful_tokens_per_second"] = {key: useful / value for key, value in row["seconds"].items()}
    row["faster"] = statistics.median(a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True))
    return row | {"goal": GOAL, "met": row["faster"] >= GOAL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    sizes = {"default": decoder_recipe("mini").model}
    if options.device.type == "cuda":
        sizes |= {size: decoder_preset(size) for size in ("44M", "1B")}
    rows = []
    for name, config in sizes.items():
        rows.append(measure(name, config, options.turns, options.device))
        print(json.dumps(rows[-1]), flush=True)
    clock = "wall" if options.device.type == "cuda" else "processor time, one thread"
    result = {"machine": machine(options.device), "clock": clock, "gpu": None, "rows": rows}
    if options.device.type != "cuda":
        result["gpu"] = "not measured"
    if options.json:
        with whole_file(options.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(not row["passed"] for row in rows))


if __name__ == "__main__":
    main()
