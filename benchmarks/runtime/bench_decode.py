"""The points of ``kinetok bench decode`` and ``step`` under pytest-benchmark: ``pytest benchmarks/runtime --benchmark-only``.

One clip of 50 tokens by each route that runs here, and our steps at two positions, each after a check of its tokens. For
figures with limits, percentiles and ratios use ``kinetok bench``; this is for tracking a change from commit to commit.
"""

from typing import Any

import pytest
import torch

from kinetok.runtime.backends import open_backend
from kinetok.runtime.bench import checks, decode, routes, step, subject
from kinetok.runtime.bench.clock import this_device

TEXT, TOKENS, POSITIONS = 20, 50, (30, 300)
SIZES = ("111M",) if not torch.cuda.is_available() else ("111M", "1B", "7B")


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest) -> subject.Subject:
    device = this_device()
    return subject.load(request.param, None, device, "bf16" if device.type == "cuda" else "fp32")


def settled(call: Any) -> Any:
    """With its work on the device done."""

    def run() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("name", ["ours", *(peer for peer in decode.PEERS if peer != "compile")])
def test_decode(benchmark: Any, model: subject.Subject, name: str) -> None:
    asked = decode.DecodeSettings(device=model.device, dtype=model.dtype, tokens=(TOKENS,), text=TEXT)
    try:
        route = decode.make(name, model, asked, 1)
    except routes.CannotRun as reason:
        pytest.skip(f"{name}: {reason}")
    features = torch.randn(1, TEXT, model.plain.config.text_dim, device=model.device)
    assert checks.greedy(model.plain, features, route.run(features, TOKENS, lambda: None))["passed"]
    benchmark.pedantic(settled(lambda: route.run(features, TOKENS, lambda: None)), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("position", POSITIONS)
def test_step(benchmark: Any, model: subject.Subject, position: int) -> None:
    asked = step.StepSettings(device=model.device, dtype=model.dtype, positions=(position,), text=TEXT)
    features = torch.randn(TEXT, model.plain.config.text_dim, device=model.device)
    name, capacity = routes.own_backend(model.model.decoder), position + asked.steps
    backend = open_backend(name, subject.own_copy(model.model), 2, capacity)
    runs = step.Runs(backend, model.plain.config.codebook, features, asked, 1)
    given, (_, tokens) = runs.given[position], runs(position)
    whole = torch.cat((tokens.new_tensor(given), tokens[0]))[None]
    assert checks.greedy(model.plain, features[None], whole, given=len(given))["passed"]
    benchmark.pedantic(settled(lambda: runs(position)), rounds=10, warmup_rounds=1)
