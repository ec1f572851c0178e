"""Streams of the default model: generate's frames, as they come; new prompts; the end."""

import sys
import threading

import numpy as np
import pytest

import kinetok
from kinetok.errors import UserError


@pytest.fixture(scope="module")
def engine() -> kinetok.Engine:
    return kinetok.load(device="cpu")


def test_the_blocks_of_a_stream_are_generates_clip(engine) -> None:
    clip = engine.generate("a person walks forward", seconds=4, seed=3)[0]
    blocks = list(engine.stream("a person walks forward", seconds=4, seed=3))
    assert [len(block) for block in blocks] == [2] * 60  # the default tokenizer is causal: two frames a token
    for name, close in (("features", 1e-5), ("root", 1e-5), ("rotations", 1e-5)):
        together = np.concatenate([getattr(block, name) for block in blocks])
        np.testing.assert_allclose(together, getattr(clip, name), atol=close)
    np.testing.assert_array_equal(blocks[0].offsets, clip.offsets)


def test_a_stream_without_an_end_goes_on_past_the_trained_length_and_stops_when_told(engine) -> None:
    with engine.stream("a person walks in a circle", seconds=float("inf"), seed=1, guidance=1.0) as stream:
        blocks = [next(stream) for _ in range(300)]  # 20 s: the window slides twice
    root = np.concatenate([block.root for block in blocks])
    assert np.isfinite(root).all() and np.linalg.norm(np.diff(root, axis=0), axis=1).max() < 0.2
    assert next(stream, None) is None
    with pytest.raises(UserError, match="over"):
        stream.redirect("a person jumps")


def test_a_new_prompt_takes_over(engine) -> None:
    stream = engine.stream("a person walks forward", seconds=2, seed=2)
    before = [next(stream) for _ in range(20)]
    stream.redirect("a person runs")
    after = list(stream)
    assert len(after) == 30 and {block.text for block in after} == {"a person runs"}  # two seconds from here
    walked, ran = (np.concatenate([block.root for block in part])[-20:, [0, 2]] for part in (before, after))
    assert np.linalg.norm(ran[-1] - ran[0]) > 2 * np.linalg.norm(walked[-1] - walked[0]) > 0.4
    assert np.abs(after[0].root[0] - before[-1].root[-1]).max() < 0.1  # the world goes on
    with pytest.raises(UserError, match="empty"):
        engine.stream("a person runs").redirect(" ")


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_a_new_prompt_that_leaves_room_for_one_token_carries_one(soak, backend: str) -> None:
    with soak.small_engine(positions=6, backend=backend).stream("walk", seconds=float("inf")) as stream:
        before = [next(stream) for _ in range(4)]
        stream.redirect("run fast a bit")  # five positions of six; two tokens would be carried otherwise
        assert [len(block) for block in before + [next(stream) for _ in range(4)]] == [2] * 8


def test_what_a_stream_refuses(engine, soak) -> None:
    with pytest.raises(UserError, match="speed"):
        engine.stream("a person runs", speed=2)
    with pytest.raises(UserError, match="empty"):
        engine.stream("")
    broken = soak.small_engine()
    broken.text.encode = lambda texts: [soak.torch.full((3, 8), soak.torch.nan) for _ in texts]
    with pytest.raises(UserError, match="token 0"):
        next(broken.stream("walk"))


def test_a_stream_that_is_over_leaves_its_place_to_the_next(soak) -> None:
    engine = soak.small_engine()
    clip = engine.generate("walk", seconds=1, seed=4)[0].features

    def frames(stream, blocks: int) -> np.ndarray:
        return np.concatenate([next(stream).features for _ in range(blocks)])

    closed, ended, failed = (
        engine.stream("sit", seed=1),
        engine.stream("run fast", seconds=0.2),
        engine.stream("walk"),
    )
    crowds = {id(stream._crowd) for stream in (closed, ended, failed)}
    assert len(crowds) == 3  # at the same time
    assert len(list(ended)) == 3 and len(frames(closed, 5)) == 10
    closed.close()
    closed.close()
    failed._crowd.scheduler.fail(failed._crowd._get(failed._handle).character, "on purpose")
    with pytest.raises(UserError, match="on purpose"):
        next(failed)
    later = [engine.stream("walk", seconds=1, seed=4) for _ in range(4)]
    assert crowds < {id(stream._crowd) for stream in later}
    for stream in later:
        np.testing.assert_allclose(frames(stream, 15), clip, atol=2e-6)


def test_a_stream_is_closed_from_other_threads_while_one_reads(soak) -> None:
    engine, raised = soak.small_engine(), []

    def caught(call) -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(10):
            stream = engine.stream("walk", seconds=float("inf"))
            next(stream)
            reader = threading.Thread(target=caught, args=(lambda stream=stream: list(stream),))
            closers = [threading.Thread(target=caught, args=(stream.close,)) for _ in range(4)]
            for thread in (reader, *closers):
                thread.start()
            for thread in (reader, *closers):
                thread.join(60)
                assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert not raised and len(engine._stages) == len(set(map(id, engine._stages))) == 1  # given back once each time


def test_a_stream_that_is_closed_in_the_middle_of_a_block_ends(soak) -> None:
    engine = soak.small_engine()
    stream = engine.stream("walk", seconds=float("inf"))
    decode = stream._crowd.scheduler.backend.decode

    def signalled(slots, tokens):
        stream.close()  # as a signal handler would
        return decode(slots, tokens)

    next(stream)
    stream._crowd.scheduler.backend.decode = signalled
    assert next(stream, None) is None
    stream._crowd.scheduler.backend.decode = decode
    clip = engine.generate("sit", seconds=0.4)[0].features
    frames = np.concatenate([block.features for block in engine.stream("sit", seconds=0.4)])
    np.testing.assert_allclose(frames, clip, atol=2e-6)
