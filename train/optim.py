"""The optimiser, its rates, and the moving average of the weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kinetok.errors import UserError

SCHEDULES = ("cosine", "reference", "reference-tokenizer")
DROP = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Everything the loop needs to know about a run of ``steps`` steps.

    schedule: "cosine" is a linear warm-up and a cosine to zero; "reference" is that of the released decoders, with its
    second rise, "reference-tokenizer" that of the released tokenizer, which drops at ``milestone`` (``learning_rate``).
    ema None keeps no average, clip_norm None does not clip. Weight decay acts on matrices, or on all parameters with
    ``decay_all``. Losses are logged every ``log_every`` steps.
    keep: which (averaged) weights are the result, those of the lowest validation loss or the last ones (where the held-out
    clips say too little to choose by).
    """

    steps: int
    seed: int = 0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_all: bool = False
    warmup: int = 100
    schedule: Literal["cosine", "reference", "reference-tokenizer"] = "cosine"
    milestone: int = 300_000
    clip_norm: float | None = 1.0
    ema: float | None = 0.995
    validate_every: int = 250
    save_every: int = 250
    log_every: int = 50
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"LoopConfig: expected schedule to be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UserError(f"LoopConfig: expected ema from 0 to below 1, got {self.ema!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"LoopConfig: expected clip_norm above 0, got {self.clip_norm!r}")


def learning_rate(config: LoopConfig, step: int) -> float:
    """The rate used by step 0, 1, ...

    "reference" (section 4): linear from 0, then a cosine whose half period is steps - steps // 10 counted from the end of
    the warm-up, so that the rate is 0 before the end and rises again after it. "reference-tokenizer": linear over
    warmup - 1 steps, which it leaves just below the peak; there it stays for ``milestone`` steps, then at a twentieth.
    """
    if config.schedule == "reference-tokenizer":
        top = config.lr / (config.warmup + 1)
        if step < config.warmup - 1:
            return top * (step + 2)
        return top * config.warmup * (DROP if step - (config.warmup - 1) >= config.milestone else 1)
    if config.schedule == "reference":
        if step < config.warmup:
            return config.lr * step / config.warmup
        half = config.steps - config.steps // 10
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / half))
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def adamw(module: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """Fused AdamW over the module's parameters; its rate is set before each step."""
    # Decay acts on matrices only: a shrunken norm scale or bias regularises nothing. The reference decays everything.
    decayed = [p for p in module.parameters() if p.ndim >= 2 or config.decay_all]
    others = [p for p in module.parameters() if p.ndim < 2 and not config.decay_all]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, config.weight_decay), (others, 0.0))
        if params
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class Average:
    """The moving average of a module's state (parameters and buffers; whole numbers are copied), sharded as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.state: dict[str, Tensor] = {name: value.clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def follow(self, module: nn.Module, decay: float) -> None:
        for mean, value in zip(self.state.values(), module.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.state.items():
            value.copy_(state[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module with the averages for its state, in evaluation mode; its own state comes back at the end."""
        here = module.state_dict()
        own = {name: value.clone() for name, value in here.items()}
        training = module.training
        try:
            self._put(here, self.state)
            yield module.eval()
        finally:
            self._put(here, own)
            module.train(training)

    @staticmethod
    @torch.no_grad()
    def _put(here: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, value in here.items():
            value.copy_(values[name])
