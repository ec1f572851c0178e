"""Kills a training with SIGKILL at random moments, resumes it each time, and compares it with one that was left alone.

    python benchmarks/train/soak_resume.py --kills 20 --seed 1 --json benchmarks/results/soak_resume.json

Every start is a process of its own (forked, as the packages take long to import). Losses, gradient norms and validation
figures of every step, and all tensors of the last checkpoint, must be the same bits; exit code 1 when they are not.
"""

import argparse
import importlib
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinetok.files import whole_file
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.train.decoder import next_token_loss
from kinetok.train.loop import fit
from kinetok.train.optim import LoopConfig

STEPS = 40
CONFIG = LoopConfig(
    steps=STEPS, lr=3e-3, warmup=5, ema=0.9, validate_every=8, save_every=4, log_every=1, weight_decay=0.1
)
MODEL = DecoderConfig(n_layer=2, n_head=2, n_embd=32, codebook=60, text_dim=8, block_size=32)


class Toy:
    """Sequences that count upwards; draws from numpy's generator, dropout from torch's."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = MotionDecoder(MODEL)

    def _loss(self, module: nn.Module, start: np.ndarray, dropout: float) -> Tensor:
        assert isinstance(module, MotionDecoder)
        motion = torch.from_numpy(start[:, None] + np.arange(20)) % MODEL.codebook
        tokens = torch.cat((torch.full((len(start), 3), MODEL.pad_id), motion), 1)
        targets = torch.full_like(tokens, -100)
        targets[:, 2:-1] = tokens[:, 3:]
        text = torch.ones(len(start), 3, MODEL.text_dim)
        return next_token_loss(module, module.states(tokens, text, torch.ones(len(start), 3), dropout=dropout), targets)

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        return {"loss": self._loss(self.module, rng.integers(MODEL.codebook, size=8), 0.1)}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> Mapping[str, float]:
        return {"loss": float(self._loss(module, np.arange(0, 60, 7), 0.0))}


def child(run: Path, steps_a_second: float) -> None:
    torch.set_num_threads(1)
    task = Toy()
    if steps_a_second:
        plain = task.loss

        def slower(step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
            time.sleep(1 / steps_a_second)  # else a toy is over before it can be killed
            return plain(step, rng)

        task.loss = slower  # type: ignore[method-assign]
    fit(task, CONFIG, run, resume=True, identity={"toy": 1})


def lines(run: Path) -> list[dict[str, Any]]:
    """The log without its times; the line that is being written is left out."""
    found = []
    for line in (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [{name: value for name, value in one.items() if "seconds" not in name} for one in found]


def start(run: Path, steps_a_second: float = 0.0) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=child, args=(run, steps_a_second))
    process.start()
    return process


def finish(run: Path) -> None:
    process = start(run)
    process.join()
    if process.exitcode:
        raise SystemExit("the training failed")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if "seconds" not in str(k))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def soak(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill one training after another, each up to three times in its life, until there were ``kills`` of them."""
    rng = random.Random(seed)
    finish(folder / "whole")
    wanted = lines(folder / "whole")
    state = torch.load(folder / "whole" / "last.pt", weights_only=True)
    done: list[dict[str, Any]] = []
    equal = True
    while len(done) < kills:
        run = folder / f"cut{len(done)}"
        steps = sorted(rng.randrange(1, STEPS - 4) for _ in range(min(3, kills - len(done))))
        for step in steps:
            process = start(run, 40.0)
            while process.is_alive() and max((one["step"] for one in lines(run)), default=0) < step:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.03)  # within the step, or in the middle of a save
            process.kill()
            process.join()
            reached = max((one["step"] for one in lines(run)), default=0)
            done.append({"killed_at_step": reached, "signal": process.exitcode})
            equal &= process.exitcode == -signal.SIGKILL
        finish(run)
        equal &= lines(run) == wanted
        equal &= same(torch.load(run / "last.pt", weights_only=True), state)
    return {"kills": done, "steps": STEPS, "lines_compared": len(wanted), "equal": bool(equal)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    importlib.import_module("torch.utils.tensorboard")
    with tempfile.TemporaryDirectory() as folder:
        result = {"seed": options.seed, "torch": torch.__version__, **soak(options.kills, options.seed, Path(folder))}
    print(json.dumps(result))
    if options.json:
        with whole_file(options.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not result["equal"])


if __name__ == "__main__":
    main()
