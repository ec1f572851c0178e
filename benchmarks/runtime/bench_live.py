"""The points of ``kinetok bench stream`` and ``crowd`` under pytest-benchmark: the default model's first frames, a stream's
next block, and a step of a crowd with everyone read."""

import math
from collections.abc import Iterator
from typing import Any

import pytest

from kinetok.runtime import Engine
from kinetok.runtime.bench import live, subject
from kinetok.runtime.bench.clock import this_device


@pytest.fixture(scope="module")
def model() -> subject.Subject:
    return subject.load("default", None, this_device(), "fp32")


def engine_of(model: subject.Subject, characters: int) -> Engine:
    return live.engine_of(model, live.LiveSettings(device=model.device), characters)


def test_first_frames(benchmark: Any, model: subject.Subject) -> None:
    engine = engine_of(model, 1)

    def call() -> int:
        with engine.stream(live.PROMPT) as stream:
            return len(next(stream))

    assert call() == model.model.tokenizer.config.frames_per_token
    benchmark(call)


@pytest.fixture
def stream(model: subject.Subject) -> Iterator[Any]:
    with engine_of(model, 1).stream(live.PROMPT, seconds=math.inf) as blocks:
        next(blocks)
        yield blocks


def test_next_block(benchmark: Any, stream: Any) -> None:
    benchmark(lambda: next(stream))


@pytest.mark.parametrize("count", [1, 8, 16, 32])
def test_crowd_step(benchmark: Any, model: subject.Subject, count: int) -> None:
    engine = engine_of(model, count)
    assert live.alone_and_together(engine, count)["passed"]
    handles = [engine.submit(live.PROMPT, seconds=math.inf, request=request) for request in range(count)]

    def call() -> int:
        moved = engine.step()
        for handle in handles:
            engine.poll(handle)
        return moved

    call()  # prefills
    benchmark(call)
