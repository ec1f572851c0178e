"""The loop that both trainings share: schedule, clipping, moving average, validation, logs, resuming."""

import copy
import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kinetok.errors import UserError, missing_package
from kinetok.files import whole_file


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Everything the loop needs to know; AdamW with a linear warm-up and a cosine to zero.

    keep: which averaged weights are the result, those of the lowest validation loss or the last ones (where the held-out
    clips say too little to choose by).
    """

    steps: int
    seed: int = 0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 100
    clip_norm: float = 1.0
    ema: float = 0.995
    validate_every: int = 250
    save_every: int = 250
    keep: Literal["best", "last"] = "best"


class Task(Protocol):
    """What is trained: ``module`` holds the parameters, ``loss`` draws a batch, ``validate`` judges a module."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Named losses of one batch; "loss" is the one to minimise."""
        ...

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """Named figures of held-out data; the lowest "loss" marks the best checkpoint."""
        ...


def learning_rate(config: LoopConfig, step: int) -> float:
    """The rate used by step 0, 1, ..."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class _Log:
    """JSON lines and, where it is installed, tensorboard."""

    def __init__(self, run: Path, stack: ExitStack) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_package("tensorboard", "train", "training") from error
        self.lines = stack.enter_context((run / "log.jsonl").open("a", encoding="utf-8"))
        self.board = stack.enter_context(SummaryWriter(str(run)))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.lines.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)


def _adamw(module: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    # Decay acts on matrices only: a shrunken norm scale or bias regularises nothing.
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    others = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


@torch.no_grad()
def _follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    for mean, value in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def _save(path: Path, state: dict[str, Any]) -> None:
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def fit(task: Task, config: LoopConfig, run: str | Path, *, resume: bool = False, identity: Mapping[str, Any]) -> Path:
    """Train ``task`` in the folder ``run``; returns the file with the best averaged weights.

    ``run`` then holds ``best.pt`` ({"model", "step", "figures"}), ``last.pt`` (all that a resumed run needs),
    ``log.jsonl`` and tensorboard events. ``identity`` is what makes the run what it is: a resumed run with another one
    is refused. Raises ``UserError`` for an existing run that is not resumed and for a loss that is not finite.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    run = Path(run)
    last, best = run / "last.pt", run / "best.pt"
    identity = json.loads(json.dumps({"identity": identity, "steps": config.steps, "seed": config.seed}))
    if last.exists() and not resume:
        raise UserError(f"{run}: a run is already here; continue it with --resume, or name another folder with --out")
    run.mkdir(parents=True, exist_ok=True)
    optimizer = _adamw(task.module, config)
    average = copy.deepcopy(task.module)
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    step, lowest, spent, spent_cpu = 0, math.inf, 0.0, 0.0
    if resume and last.exists():
        state = torch.load(last, weights_only=True)
        if state["identity"] != identity:
            raise UserError(
                f"{run}: this run was made with another recipe or other data; name another folder with --out"
            )
        task.module.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"])
        step, lowest, spent, spent_cpu = (state[key] for key in ("step", "lowest", "seconds", "cpu_seconds"))

    began, began_cpu = time.perf_counter() - spent, time.process_time() - spent_cpu
    with ExitStack() as stack:
        log = _Log(run, stack)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        progress = stack.enter_context(Progress(*columns))
        bar = progress.add_task(run.name, total=config.steps, completed=step)
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            task.module.train()
            losses = task.loss(step, rng)
            if not losses["loss"].isfinite():
                raise UserError(f"{run}: the loss is {losses['loss'].item()} at step {step}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(task.module.parameters(), config.clip_norm)
            optimizer.step()
            _follow(average, task.module, min(config.ema, (step + 1) / (step + 10)))
            step += 1
            progress.update(bar, completed=step, description=f"{run.name}  loss {losses['loss'].item():.4f}")
            if step % 50 == 0:
                values = {name: float(value.detach()) for name, value in losses.items()}
                values["seconds"], values["cpu_seconds"] = time.perf_counter() - began, time.process_time() - began_cpu
                log.write("train", step, {**values, "grad_norm": float(norm)})
            if step % config.validate_every == 0 or step == config.steps:
                average.eval()
                figures = {name: float(value) for name, value in task.validate(average).items()}
                log.write("validate", step, figures)
                progress.console.print(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))
                if figures["loss"] < lowest or config.keep == "last":
                    lowest = min(lowest, figures["loss"])
                    _save(best, {"model": average.state_dict(), "step": step, "figures": figures})
            if step % config.save_every == 0 or step == config.steps:
                _save(
                    last,
                    {
                        "identity": identity,
                        "model": task.module.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "rng": rng.bit_generator.state,
                        "torch_rng": torch.get_rng_state(),
                        "step": step,
                        "lowest": lowest,
                        "seconds": time.perf_counter() - began,
                        "cpu_seconds": time.process_time() - began_cpu,
                    },
                )
    return best
