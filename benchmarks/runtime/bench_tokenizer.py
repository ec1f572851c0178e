"""Tokens to frames and back under pytest-benchmark; ``kinetok bench tokenizer`` measures the same points."""

from typing import Any

import pytest
import torch

from kinetok.runtime.bench.clock import this_device
from kinetok.runtime.bench.tokenizer import TokenizerSettings, load

SIZES = {"default": (1, 50, 150), "released": (1, 50, 150)}


@pytest.mark.parametrize("route", ["decode", "encode"])
@pytest.mark.parametrize(("preset", "count"), [(preset, count) for preset in SIZES for count in SIZES[preset]])
def test_tokenizer(benchmark: Any, preset: str, count: int, route: str) -> None:
    device = this_device()
    tokenizer = load(TokenizerSettings(preset=preset, device=device))
    config = tokenizer.config
    if route == "decode":
        given = torch.randint(config.codebook, (1, count), device=device)
    else:
        given = torch.randn(1, count * config.frames_per_token, config.input_dim, device=device)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        found = getattr(tokenizer, route)(given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return found

    assert call().shape[1] == (count * config.frames_per_token if route == "decode" else count)
    benchmark(call)
