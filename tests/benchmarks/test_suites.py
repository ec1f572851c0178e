"""The pytest-benchmark suites of the runtime, each once on a tiny model: they run, check, and skip with a reason."""

import importlib.util
from pathlib import Path

import pytest
import torch

from kinetok.model.config import DecoderConfig
from kinetok.runtime.bench import subject

FOLDER = Path(__file__).parents[2] / "benchmarks" / "runtime"


def suite(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Once:
    """In place of the benchmark fixture: calls once."""

    calls = 0

    def __call__(self, call) -> None:
        call()
        self.calls += 1

    def pedantic(self, call, **_) -> None:
        self(call)


def test_decode(monkeypatch) -> None:
    bench = suite("bench_decode")
    monkeypatch.setattr(bench, "TOKENS", 5)
    config = DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=60, text_dim=8, block_size=64)
    monkeypatch.setattr(subject, "decoder_preset", lambda name: config)
    model, once = subject.load("111M", None, torch.device("cpu"), "fp32"), Once()
    for name in ("ours", "uncached"):
        bench.test_decode(once, model, name)
    bench.test_step(once, model, 30)
    assert once.calls == 3
    if torch.cuda.is_available():
        return
    with pytest.raises(pytest.skip.Exception, match="graph: a CUDA graph needs a CUDA device"):
        bench.test_decode(once, model, "graph")


def test_live() -> None:
    bench, once = suite("bench_live"), Once()
    model = subject.load("default", None, torch.device("cpu"), "fp32")
    bench.test_first_frames(once, model)
    bench.test_crowd_step(once, model, 2)
    with bench.engine_of(model, 1).stream(bench.live.PROMPT) as stream:
        bench.test_next_block(once, stream)
    assert once.calls == 3


@pytest.mark.parametrize("route", ["decode", "encode"])
def test_tokenizer(route: str) -> None:
    once = Once()
    suite("bench_tokenizer").test_tokenizer(once, "default", 2, route)
    assert once.calls == 1
