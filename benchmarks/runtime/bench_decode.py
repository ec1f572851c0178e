"""The points of ``kinetok bench decode`` under pytest-benchmark: ``pytest benchmarks/runtime --benchmark-only``.

One clip of 50 tokens by each route that runs here, after a check that it writes our tokens. For figures with limits,
percentiles and ratios use ``kinetok bench decode``; this is for tracking a change from commit to commit.
"""

from typing import Any

import pytest
import torch

from kinetok.model.presets import decoder_preset
from kinetok.runtime.bench import decode, routes
from kinetok.runtime.bench.clock import this_device

TEXT, TOKENS = 20, 50
SIZES = {"111M": {}} if not torch.cuda.is_available() else {"111M": {}, "1B": {}, "7B": {}}


@pytest.fixture(scope="module", params=SIZES)
def decoder(request: pytest.FixtureRequest) -> Any:
    device = this_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return routes.random_decoder(decoder_preset(request.param, **SIZES[request.param]), device, dtype)


@pytest.mark.parametrize("name", ["ours", *(peer for peer in decode.PEERS if peer != "compile")])
def test_decode(benchmark: Any, decoder: Any, name: str) -> None:
    try:
        route = decode.route(name, decoder, 1, TEXT + TOKENS)
    except routes.CannotRun as reason:
        pytest.skip(f"{name}: {reason}")
    features = torch.randn(1, TEXT, decoder.config.text_dim, device=decoder.embed.weight.device)
    ours = decode.route("ours", decoder, 1, TEXT + TOKENS).run(features, TOKENS, lambda: None)
    assert decode.agree(decoder, features, ours, route.run(features, TOKENS, lambda: None))["passed"]

    def call() -> None:
        route.run(features, TOKENS, lambda: None)
        if features.is_cuda:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
