"""AdamW, clipping and the moving average, each against its formula."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kinetok.train.loop import fit
from kinetok.train.optim import Average, LoopConfig, adamw

pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")


class Slope:
    """Loss = weight . g + bias . h with fixed g and h: the gradient of every step is known."""

    g, h = torch.tensor([[3.0, -4.0], [0.0, 12.0]]), torch.tensor([5.0, -2.0])

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Linear(2, 2)
        self.first = {name: value.clone() for name, value in self.module.state_dict().items()}

    def loss(self, step: int, rng: np.random.Generator):
        return {"loss": (self.module.weight * self.g).sum() + (self.module.bias * self.h).sum()}

    def validate(self, module: nn.Module):
        return {"loss": 0.0}


CONFIG = LoopConfig(
    steps=5, lr=0.1, warmup=1, weight_decay=0.5, eps=0.5, betas=(0.8, 0.9), clip_norm=None, ema=None, keep="last",
    validate_every=5, save_every=5, log_every=1,
)  # fmt: skip


def by_hand(
    config: LoopConfig, value: np.ndarray, gradient: np.ndarray, decay: float, rates: list[float]
) -> np.ndarray:
    first, second = np.zeros_like(value), np.zeros_like(value)
    one, two = config.betas
    for step, rate in enumerate(rates, 1):
        value = value * (1 - rate * decay)
        first, second = one * first + (1 - one) * gradient, two * second + (1 - two) * gradient**2
        value = value - rate * (first / (1 - one**step)) / (np.sqrt(second / (1 - two**step)) + config.eps)
    return value


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_a_run_is_adamw_with_clipped_gradients(tmp_path: Path, decay_all: bool, clip_norm: float | None) -> None:
    """eps is large, so that the size of the gradient counts; the whole gradient's norm is sqrt(9+16+144+25+4)."""
    from kinetok.train.optim import learning_rate

    config = replace(CONFIG, decay_all=decay_all, clip_norm=clip_norm)
    task = Slope()
    fit(task, config, tmp_path, identity={})
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    norm = float(np.sqrt(198.0))
    share = 1.0 if clip_norm is None else clip_norm / norm
    rates = [learning_rate(config, step) for step in range(config.steps)]
    for name, gradient, decay in (("weight", task.g, 0.5), ("bias", task.h, 0.5 if decay_all else 0.0)):
        wanted = by_hand(config, task.first[name].double().numpy(), share * gradient.double().numpy(), decay, rates)
        np.testing.assert_allclose(last["model"][name].double().numpy(), wanted, rtol=2e-5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if line["kind"] == "train"]
    assert norms == [pytest.approx(norm)] * 5  # before clipping


def test_the_optimiser_is_the_fused_one() -> None:
    assert all(group["fused"] for group in adamw(nn.Linear(2, 2), CONFIG).param_groups)


def test_the_average_follows_its_formula(tmp_path: Path) -> None:
    """With decay min(ema, (n + 1) / (n + 10)) in step n = 0, 1, ...; validation and the result see the average."""
    config = replace(CONFIG, ema=0.3, save_every=1, validate_every=1)
    seen: list[torch.Tensor] = []

    states: list[torch.Tensor] = []

    class Watched(Slope):
        def loss(self, step, rng):
            states.append(self.module.weight.detach().clone())
            return super().loss(step, rng)

        def validate(self, module):
            seen.append(module.weight.detach().clone())
            return {"loss": 0.0}

    best = torch.load(fit(Watched(), config, tmp_path, identity={}), weights_only=True)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    after = [*states[1:], last["model"]["weight"]]
    average = states[0].double()
    for step, weight in enumerate(after):
        decay = min(0.3, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * weight.double()
        torch.testing.assert_close(seen[step].double(), average, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(best["model"]["weight"], seen[-1], rtol=0, atol=0)
    assert not torch.equal(seen[-1], last["model"]["weight"])


def test_the_average_is_put_in_and_taken_out_again() -> None:
    module = nn.BatchNorm1d(2)
    average = Average(module)
    own = {name: value.clone() for name, value in module.state_dict().items()}
    average.state["weight"].fill_(7.0)
    module.train()
    with pytest.raises(KeyboardInterrupt), average.applied(module) as applied:
        assert applied.weight[0] == 7 and not applied.training
        raise KeyboardInterrupt
    assert module.training and all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    module.num_batches_tracked += 3
    average.follow(module, 0.5)
    assert average.state["num_batches_tracked"] == 3 and average.state["weight"][0] == 4
