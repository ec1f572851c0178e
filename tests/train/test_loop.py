"""The training loop: it learns, resumes exactly, and refuses to mix runs."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.train.loop import LoopConfig, fit, learning_rate

pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")
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


def test_learns_and_keeps_the_best(tmp_path: Path) -> None:
    best = torch.load(fit(Line(), CONFIG, tmp_path / "run", identity={}), weights_only=True)
    assert best["figures"]["loss"] < 1.0 and best["step"] in (10, 20, 30, 40)
    assert (tmp_path / "run" / "log.jsonl").read_text().count('"validate"') == 4


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    fit(Line(), CONFIG, tmp_path / "whole", identity={})
    with pytest.raises(KeyboardInterrupt):
        fit(Line(stop=27), CONFIG, tmp_path / "cut", identity={})
    fit(Line(), CONFIG, tmp_path / "cut", resume=True, identity={})
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for key in ("model", "average"):
        assert all(torch.equal(whole[key][name], cut[key][name]) for name in whole[key])


def test_runs_are_not_mixed(tmp_path: Path) -> None:
    fit(Line(), CONFIG, tmp_path, identity={"a": 1})
    with pytest.raises(UserError, match="--resume"):
        fit(Line(), CONFIG, tmp_path, identity={"a": 1})
    with pytest.raises(UserError, match="another recipe"):
        fit(Line(), CONFIG, tmp_path, resume=True, identity={"a": 2})


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 0"):
        fit(Line(bad=True), CONFIG, tmp_path, identity={})


def test_schedule() -> None:
    rates = [learning_rate(CONFIG, step) for step in range(CONFIG.steps)]
    assert rates[3] == rates[4] == CONFIG.lr and rates[0] == CONFIG.lr / 4
    assert all(a >= b for a, b in pairwise(rates[4:])) and rates[-1] < 0.01 * CONFIG.lr
