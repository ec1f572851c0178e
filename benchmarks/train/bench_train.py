"""Training steps: ``python benchmarks/train/bench_train.py --json FILE``.

Useful tokens a second, what share of the measured rate of matrix products (``mfu``) and of the rate in the card's data sheet
(``mfu_of_peak``, where it is known) they come to, peak memory, and how a step divides into data, forward, backward and
optimiser, on packed batches: the default model's size on a CPU; 1B and a slice of 8 layers of the 7B (whose optimiser alone
does not fit one card) on a GPU, also compiled. And the fused cross-entropy against the plain one: its time, and how much of
the memory that the logits take it frees. A check comes first: of loss and gradients, and that a step's loss is that of weights
that know nothing. GPU rows have a goal each; ``met`` says whether it was reached, a check that fails ends with exit code 1.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from synthetic import SyntheticSequences
from torch import Tensor

from kinetok.files import whole_file
from kinetok.kernels.cross_entropy import linear_cross_entropy, reference
from kinetok.model.config import DecoderConfig
from kinetok.model.presets import decoder_preset
from kinetok.runtime.bench.machine import machine
from kinetok.train.data.loading import Steps
from kinetok.train.feed import Draw
from kinetok.train.loop import OneProcess
from kinetok.train.optim import adamw, learning_rate
from kinetok.train.packing import PackedBatch
from kinetok.train.recipes import decoder_recipe
from kinetok.train.scale import Engine, PackedTask
from kinetok.train.scale_recipes import ScaleRecipe, scale_recipe, step_flop

ROUTES: dict[str, Callable[..., Tensor]] = {"plain": reference.linear_cross_entropy, "fused": linear_cross_entropy}
PARTS = ("data", "forward", "backward", "optimiser")
GOALS = {"mfu": 0.46, "freed": 0.9, "time": 1.15}
GPU_ROWS = (
    ("1B", decoder_preset("1B"), 64, Engine()),
    ("7B, 8 of 36 layers", decoder_preset("7B", n_layer=8), 128, Engine()),
    ("1B, compiled", decoder_preset("1B"), 64, Engine(compile=True)),
    ("7B, 8 of 36 layers, compiled", decoder_preset("7B", n_layer=8), 128, Engine(compile=True)),
)
# Dense bf16 products a second, from the makers' data sheets, by a part of the name that the driver gives.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
PEAKS |= {"L40S": 362e12, "RTX 4090": 165e12}


def clock(device: torch.device) -> float:
    """Seconds: of the wall on a GPU, of this process's own work on a processor that others use as well."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        began = clock(device)
        _ = a @ b.T
        times.append(clock(device) - began)
    return 2 * side**3 / statistics.median(times[1:])


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is used now


def memory(device: torch.device, *, peak: bool) -> int:
    """Bytes: of tensors on a GPU, of the whole process on Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    wanted = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(wanted))
    return int(line.split()[1]) * 1024


def peak_rate(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)


def step_row(
    name: str, config: DecoderConfig, batch: int, engine: Engine, steps: int, device: torch.device, bf16: bool
) -> dict[str, Any]:
    """The whole steps are timed first, as a training takes them: prepared ahead by threads, without a stop in between.

    Then as many that stop after each part, the preparation among them.
    """
    loop = replace(scale_recipe("motionmillion-44m").loop, steps=1000, warmup=10)
    recipe = ScaleRecipe(model=config, loop=loop, batch=batch, bf16=bf16)
    data = SyntheticSequences(codebook=config.codebook, text_dim=config.text_dim)
    task = PackedTask(recipe, data, OneProcess(), engine)  # type: ignore[arg-type]
    task.module.train()
    optimizer = adamw(task.module, recipe.loop)
    spent = dict.fromkeys(PARTS, 0.0)
    losses: list[Tensor] = []
    last = 0.0

    def told(part: str) -> None:
        nonlocal last
        now = clock(device)
        spent[part] += now - last
        last = now

    def step(number: int, made: Callable[[int], tuple[Draw, list[PackedBatch]]], told: Callable[[str], None]) -> Draw:
        draw, batches = made(number)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe.loop, number)
        optimizer.zero_grad(set_to_none=True)
        loss = task.passes(draw, batches, told)["loss"]
        loss.backward()
        told("backward")
        optimizer.step()
        told("optimiser")
        losses.append(loss.detach())
        return draw

    ahead = Steps(task.feed.step, loop.steps)
    for number in range(2):  # makes the optimiser's moments, compiles, warms everything up
        step(number, ahead, lambda part: None)
    reset_peak(device)
    began = clock(device)
    draws = [step(number, ahead, lambda part: None) for number in range(2, steps + 2)]
    total = clock(device) - began
    peak = memory(device, peak=True)
    last = clock(device)
    for number in range(steps + 2, 2 * steps + 2):
        step(number, task.feed.step, told)
    useful, flop = 0, 0.0
    for draw in draws:
        text = data.text_lengths[draw.captions]
        useful += int((text + draw.count + 1).sum())
        flop += sum(step_flop(config, 1, int(t), int(m) + 1) for t, m in zip(text, draw.count, strict=True))
    dtype = torch.bfloat16 if bf16 else torch.float32
    rate, card = matmul_rate(device, dtype), peak_rate(device)
    unknowing = math.log(config.head_rows)
    values = torch.stack(losses).tolist()
    row = {
        "size": name,
        "batch": batch,
        "dtype": str(dtype),
        "losses": values,
        "passed": all(abs(value - unknowing) < 0.1 * unknowing for value in values),
        "useful_tokens_per_second": useful / total,
        "flop_per_second": flop / total,
        "matmul_flop_per_second": rate,
        "mfu": flop / total / rate,
        "peak_flop_per_second": card,
        "mfu_of_peak": None if card is None else flop / total / card,
        "peak_memory_bytes": peak,
        "share_of_step": {part: value / sum(spent.values()) for part, value in spent.items()},
    }
    if device.type == "cuda":
        reached = row["mfu"] if card is None else row["mfu_of_peak"]
        row |= {"goal": GOALS["mfu"], "met": reached >= GOALS["mfu"]}  # type: ignore[operator]
    return row


def route_memory(name: str, rows: int, classes: int, width: int, device: torch.device) -> dict[str, int]:
    """Bytes above what was there before: at most, and of these those that are no gradients, which are the logits'.

    The fused route keeps its gradients from the forward pass on, and hands copies of them out in the backward pass.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(classes, (rows,), device=device)
    results = hidden.nbytes + weight.nbytes
    route = ROUTES[name]
    small = route(hidden[:2, :8], weight[:16, :8], targets[:2] % 16)  # imports and first-call buffers are no logits
    torch.autograd.grad(small, (hidden, weight))
    reset_peak(device)
    before = memory(device, peak=False)
    loss = route(hidden, weight, targets)
    forward = memory(device, peak=True) - before
    torch.autograd.grad(loss, (hidden, weight))
    total = memory(device, peak=True) - before
    if name == "plain":
        return {"peak": total, "logits": total - results}
    return {"peak": total, "logits": max(forward - results, total - 2 * results)}


def memory_of_routes(rows: int, classes: int, width: int, device: torch.device) -> dict[str, dict[str, int]]:
    """``route_memory`` in processes of their own, in which freed blocks go back to the system at once."""
    found = {}
    for name in ROUTES:
        options = [name, str(rows), str(classes), str(width), str(device)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--memory", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    return found


def loss_row(name: str, rows: int, classes: int, width: int, turns: int, device: torch.device) -> dict[str, Any]:
    """The fused loss beside the plain one."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(classes, width, device=device, dtype=dtype) * width**-0.5
    targets = torch.randint(classes, (rows,), device=device)
    routes = ROUTES

    def run(route: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        value = route(h, w, targets)
        return value.detach(), *torch.autograd.grad(value, (h, w))

    row: dict[str, Any] = {"size": name, "rows": rows, "classes": classes, "width": width}
    found = [run(route) for route in routes.values()]
    error = max(float((a - b).norm() / b.norm()) for b, a in zip(*found, strict=True))
    del found
    used = memory_of_routes(rows, classes, width, device)
    row |= {"error": error, "passed": error < (2e-2 if dtype == torch.bfloat16 else 1e-4), "memory": used}
    row |= {"freed": 1 - used["fused"]["logits"] / used["plain"]["logits"], "time": None}
    if row["passed"]:
        times: dict[str, list[float]] = {key: [] for key in routes}
        for turn in range(turns + 1):
            for key, route in routes.items():
                began = clock(device)
                run(route)
                if turn:
                    times[key].append(clock(device) - began)
        row["seconds"] = {key: statistics.median(values) for key, values in times.items()}
        row["time"] = statistics.median(f / p for p, f in zip(times["plain"], times["fused"], strict=True))
        row["goal"] = {"freed": GOALS["freed"], "time": GOALS["time"]}
        row["met"] = row["freed"] >= GOALS["freed"] and row["time"] <= GOALS["time"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        name, *sizes, where = options.memory
        print(json.dumps(route_memory(name, *map(int, sizes), torch.device(where))))
        return
    device: torch.device = options.device
    cuda = device.type == "cuda"
    result: dict[str, Any] = {"machine": machine(device), "steps": [], "losses": []}
    result["clock"] = "wall" if cuda else "processor time, one thread"

    def note(kind: str, row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        result[kind].append(row)
        if options.json:
            with whole_file(options.json) as path:
                path.write_text(json.dumps(result, indent=1) + "\n")

    if cuda:
        note("losses", loss_row("7B", 8192, 64001, 4096, 10, device))
        for name, config, batch, engine in GPU_ROWS:
            torch.compiler.reset()
            note("steps", step_row(name, config, batch, engine, 10, device, True))
    else:
        torch.set_num_threads(1)
        config = decoder_recipe("mini").model
        note("losses", loss_row("default", 1200, config.head_rows, config.n_embd, options.steps, device))
        for bf16 in (True, False):
            note("steps", step_row("default", config, 24, Engine(), options.steps, device, bf16))
        for name, *_ in GPU_ROWS:
            note("steps", {"size": name, "gpu": "not measured"})
        note("losses", {"size": "7B", "gpu": "not measured"})
    sys.exit(any(not row.get("passed", True) for row in (*result["losses"], *result["steps"])))


if __name__ == "__main__":
    main()
