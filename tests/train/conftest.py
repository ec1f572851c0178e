"""A toy that the training loop fits."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kinetok.train.optim import LoopConfig

CONFIG = LoopConfig(steps=40, lr=0.05, warmup=4, validate_every=10, save_every=10, ema=0.9)


class Line:
    """Fits y = 2 x + noise; ``stop`` interrupts after that many draws."""

    def __init__(self, stop: int = 10**9, bad: bool = False) -> None:
        torch.manual_seed(1)
        self.module: nn.Module = nn.Linear(1, 1)
        self.stop, self.bad = stop, bad

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        if step >= self.stop:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((8, 1))).float()
        loss = (self.module(x) - 2 * x + 0.01 * torch.randn(8, 1)).square().mean()
        return {"loss": loss * (torch.nan if self.bad else 1)}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> Mapping[str, float]:
        return {"loss": float((module(torch.ones(1, 1)) - 2).abs().sum())}


@pytest.fixture
def line() -> type[Line]:
    return Line


@pytest.fixture
def config() -> LoopConfig:
    return CONFIG
