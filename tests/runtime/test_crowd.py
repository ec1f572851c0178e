"""The crowd through the engine: frames in any company, twins, readers who stop, errors in the middle, random stories.

Where the faults that a crowd must survive are tested:
- cancel at any moment: test_a_signal_handler_cancels_anywhere_in_a_step, test_calls_come_from_several_threads, Stories
- random joins, leaves and cancels, no leak and no cross-talk: test_random_stories; ten thousand events of the same rules
  are benchmarks/runtime/soak_crowd.py
- queue full: test_a_full_queue_refuses_and_takes_again, test_clips_that_nobody_reads_fill_the_place_of_new_ones
- prompt too long, budget beyond the cache: test_bad_wishes, test_scheduler.py test_what_can_never_run_is_refused
- a consumer that stops reading: test_a_reader_who_stops_stands_still_and_holds_nobody_up
- Ctrl-C: test_ctrl_c_anywhere_in_a_step_changes_nobodys_frames, tests/cli/test_generate.py test_ctrl_c_of_a_long_clip_...
- an exception in a step: test_scheduler.py test_a_step_that_was_cut_off_can_be_repeated, test_one_that_cannot_be_...,
  test_one_whose_logits_...; test_frames_that_are_no_numbers_end_their_character_alone; the "fault" of Stories
"""

import sys
import threading
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kinetok.errors import UserError


def read(engine, handle: int) -> tuple[np.ndarray, str]:
    """All frames of a character, stepping until it is over."""
    parts = []
    while True:
        update = engine.poll(handle)
        if update.motion is not None:
            parts.append(update.motion.features)
        if update.over:
            return np.concatenate(parts) if parts else np.zeros((0, 272)), update.state
        engine.step()


@pytest.mark.parametrize("causal", [True, False])
def test_a_crowds_clips_are_generates_clips(soak, causal: bool) -> None:
    engine = soak.small_engine(causal=causal, characters=2)
    wishes = [("walk", {"seconds": 1.0}), ("sit", {"guidance": 2.0}), ("run fast", {"seconds": 0.1, "seed": 7})]
    handles = [engine.submit(text, request=i, **wish) for i, (text, wish) in enumerate(wishes)]
    for i, (text, wish) in enumerate(wishes):
        clip = engine.generate(["wave"] * i + [text], **wish)[i]
        frames, state = read(engine, handles[i])
        assert state == "done" and len(frames) == len(clip)
        np.testing.assert_allclose(frames, clip.features, atol=2e-6)


def test_blocks_go_on_in_one_world(soak) -> None:
    engine = soak.small_engine()
    clip = engine.generate("walk", seconds=3)[0]
    handle, roots, rotations = engine.submit("walk", seconds=3), [], []
    for number in range(50):
        engine.step()
        if number % 7 == 0 or number > 44:
            update = engine.poll(handle)
            if update.motion is not None:
                assert update.motion.text == "walk"
                roots.append(update.motion.root)
                rotations.append(update.motion.rotations)
            if update.over:
                break
    np.testing.assert_allclose(np.concatenate(roots), clip.root, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(rotations), clip.rotations, atol=1e-4)


def test_twins_share_their_past_and_then_differ(soak) -> None:
    engine = soak.small_engine()
    first = engine.submit("walk", seconds=2)
    for _ in range(10):
        engine.step()
    same, other = engine.fork(first), engine.fork(first, request=4)
    (one, _), (two, _), (three, _) = (read(engine, handle) for handle in (first, same, other))
    assert np.array_equal(one[-len(two) :], two) and len(two) == 40 and not np.array_equal(two, three)


def test_a_reader_who_stops_stands_still_and_holds_nobody_up(soak) -> None:
    engine = soak.small_engine()
    unread = engine.submit("walk", seconds=float("inf"))
    for _ in range(310):
        engine.step()
    assert engine.step() == 0 and engine._start().waiting(unread) == "paused"
    frames, state = read(engine, engine.submit("sit", seconds=1))
    assert state == "done" and len(frames) == 30
    update = engine.poll(unread)
    assert 600 <= len(update.motion) <= 602 and update.state == "running" and engine.step() == 1


def test_clips_that_nobody_reads_fill_the_place_of_new_ones(soak) -> None:
    engine = soak.small_engine(characters=4, queue=3)
    handles = [engine.submit("walk", seconds=0.1) for _ in range(3)]
    while engine.step():
        pass
    with pytest.raises(UserError, match="3 characters are over and unread"):
        engine.submit("walk")
    engine.cancel(handles[0])
    runs = engine.submit("walk", seconds=2)
    engine.fork(runs, seed=8)
    engine.submit("walk", seconds=0.1)
    engine.step()
    engine.step()
    with pytest.raises(UserError, match="3 characters are over and unread"):
        engine.fork(runs)
    engine.cancel(handles[1])
    assert read(engine, engine.submit("walk", seconds=0.1))[1] == "done"


def test_a_full_queue_refuses_and_takes_again(soak) -> None:
    engine = soak.small_engine(characters=1, queue=2)
    handles = [engine.submit("walk", seconds=0.2, guidance=2.0, request=i) for i in range(3)]  # one runs, two wait
    with pytest.raises(UserError, match="queue is full: 2"):
        engine.submit("sit")
    assert [engine._start().waiting(handle) for handle in handles] == ["running", "queued", "queued"]
    engine.cancel(handles[1])
    handles[1] = engine.submit("sit", seconds=0.2)
    assert [read(engine, handle)[1] for handle in handles] == ["done"] * 3


def test_those_who_are_gone_are_named(soak) -> None:
    engine = soak.small_engine()
    done, gone = engine.submit("walk", seconds=0.1), engine.submit("walk")
    read(engine, done)
    engine.cancel(gone)
    for call in (engine.poll, engine.cancel, engine.fork, lambda handle: engine.redirect(handle, "sit")):
        for handle in (done, gone, 99, [done]):
            with pytest.raises(UserError, match="no character"):
                call(handle)


def test_bad_wishes(soak) -> None:
    engine = soak.small_engine(positions=40)
    for wish, says in (
        ({"deadline": -1.0}, "deadline"),
        ({"deadline": float("nan")}, "deadline"),
        ({"deadline": "soon"}, "deadline"),
        ({"deadline": True}, "deadline"),
        ({"deadline": 10**400}, "deadline"),
        ({"seconds": 10**400}, "seconds"),
        ({"seed": None}, "seed"),
        ({"params": "sit"}, "several prompts"),
        *(({"request": bad}, "request") for bad in (-1, 2**32, 1.0, "one", True, None)),
        ({"seconds": 9.0}, "room"),
        ({"speed": 1}, "speed"),
    ):
        with pytest.raises(UserError, match=says):
            engine.submit("walk", **wish)
    with pytest.raises(UserError, match="fills the whole model"):
        engine.submit("word " * 50)
    with pytest.raises(UserError, match="use stream"):
        engine.generate("walk", seconds=float("inf"))
    with pytest.raises(UserError, match="got NoneType"):
        engine.generate(None)
    handle = engine.submit("walk", seconds=0.2)
    with pytest.raises(UserError, match="request"):
        engine.fork(handle, request=-1)
    assert len(read(engine, handle)[0]) == 6  # nobody has to live with what was refused


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("characters", (0, -1, 2.5, True)),
        ("queue", (0, "many")),
        ("positions", (0, -5, 181, "all")),
        ("backend", ("abacus", "", "torch:here", None)),
        ("kv", ("bf16", "fp8", None)),
    ],
)
def test_bad_limits_are_refused_at_once(soak, name: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"^{name}: "):
            soak.small_engine(**{name: value})


def test_frames_that_are_no_numbers_end_their_character_alone(soak) -> None:
    engine = soak.small_engine()
    handles = [engine.submit("walk", seconds=1, request=i) for i in range(2)]
    engine.step()
    clips = engine._start().detokenizer.clips
    clips[1] = replace(clips[1], kept=tuple(torch.full_like(line, torch.nan) for line in clips[1].kept))
    (good, state), (_, other) = (read(engine, handle) for handle in handles)
    assert (state, other) == ("done", "failed")
    np.testing.assert_allclose(good, engine.generate("walk", seconds=1)[0].features, atol=2e-6)


STEP = ("scheduler.py", "steps.py", "ahead.py", "crowd.py", "streaming.py", "backends/torch.py", "backends/fused.py")


def traced(step, number: int | None, act) -> int:
    """Run a step, and ``act`` in front of its line number ``number``; how many lines it has."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if not frame.f_code.co_filename.endswith(STEP):
            return None
        if event == "line":
            lines += 1
            if lines == number:
                act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(before)
    return lines


def told(soak, backend: str, interrupt: int | None) -> tuple[int, list]:
    """Three characters, the fourth step of whom is cut off at its line number ``interrupt``; how many lines it has, and
    everyone's frames and state."""
    engine = soak.small_engine(causal=False, backend=backend)
    wishes = [{"seconds": 0.5, "guidance": 2.0}, {"seconds": 4 / 15}, {"seconds": 13.0}]
    handles = [engine.submit("walk", request=i, **wish) for i, wish in enumerate(wishes)]
    for _ in range(3):
        engine.step()
    engine._start()._figures[handles[2]].character.job = replace(
        engine._start().job(handles[2]), least=9, most=9, window=3, keep=2
    )

    def cut_off() -> None:
        raise KeyboardInterrupt

    lines = 0
    with suppress(KeyboardInterrupt):
        lines = traced(engine.step, interrupt, cut_off)
    return lines, [read(engine, handle) for handle in handles]


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_ctrl_c_anywhere_in_a_step_changes_nobodys_frames(soak, backend: str) -> None:
    lines, expected = told(soak, backend, None)
    assert [(len(frames), state) for frames, state in expected] == [(16, "done"), (8, "done"), (18, "done")]
    for interrupt in range(1, lines, lines // 25):
        _, got = told(soak, backend, interrupt)
        for (frames, state), (wanted, _) in zip(got, expected, strict=True):
            assert state == "done" and np.array_equal(frames, wanted), f"cut off at line {interrupt} of {lines}"


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_a_signal_handler_cancels_anywhere_in_a_step(soak, backend: str) -> None:
    """Its call is one of the same thread, in the middle of the step, which goes on behind it."""

    def story(number: int | None, victim: int) -> tuple[int, list]:
        engine = soak.small_engine(causal=False, backend=backend)
        handles = [engine.submit("walk", request=i, seconds=0.6, guidance=2.0 - i % 2) for i in range(3)]
        for _ in range(3):
            engine.step()
        lines = traced(engine.step, number, lambda: engine.cancel(handles[victim]))
        others = [read(engine, handle) for handle in handles if number is None or handle != handles[victim]]
        if number is not None:
            with pytest.raises(UserError, match="no character"):
                engine.poll(handles[victim])
        scheduler = engine._start().scheduler
        assert len(scheduler.free) == scheduler.backend.slots
        return lines, others

    lines, expected = story(None, 0)
    for number in range(1, lines, lines // 15):
        victim = number % 2
        for (frames, state), (wanted, _) in zip(
            story(number, victim)[1], expected[:victim] + expected[victim + 1 :], strict=True
        ):
            assert state == "done" and np.array_equal(frames, wanted), f"cancelled at line {number} of {lines}"


def test_a_signal_handler_may_do_nothing_else(soak) -> None:
    engine, said = soak.small_engine(), []
    handle = engine.submit("walk", seconds=0.4)
    lines = traced(engine.step, None, None)

    def act() -> None:
        for call in (engine.step, lambda: engine.poll(handle), lambda: engine.submit("sit")):
            with pytest.raises(UserError, match="may only cancel") as error:
                call()
            said.append(error)

    traced(engine.step, lines // 2, act)
    assert len(said) == 3 and read(engine, handle)[1] == "done"


def test_calls_come_from_several_threads(soak) -> None:
    engine, stop, errors = soak.small_engine(), threading.Event(), []

    def steps() -> None:
        try:
            while not stop.is_set():
                engine.step()
        except Exception as error:
            errors.append(error)

    worker = threading.Thread(target=steps)
    worker.start()
    frames = [read(engine, engine.submit("walk", seconds=0.2)) for _ in range(3)]
    for _ in range(5):
        engine.cancel(engine.submit("sit"))
    stop.set()
    worker.join()
    assert not errors and len(engine._start().scheduler.free) == engine._start().scheduler.backend.slots
    assert all(np.array_equal(frames[0][0], other) for other, _ in frames)


class Stories(RuleBasedStateMachine):
    """The soak command's rules, by hypothesis's choice."""

    soak = None

    backend = "torch"

    @initialize(seed=st.integers(0, 9), characters=st.integers(1, 3), causal=st.booleans())
    def start(self, seed: int, characters: int, causal: bool) -> None:
        self.chaos = self.soak.Chaos(seed, characters=characters, causal=causal, backend=self.backend)

    @rule(name=st.sampled_from(["submit", "submit", "poll", "cancel", "fork", "redirect", "fault"]))
    def event(self, name: str) -> None:
        getattr(self.chaos, name)()

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.chaos.step()

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "chaos"):
            self.chaos.check()

    def teardown(self) -> None:
        if hasattr(self, "chaos"):
            self.chaos.finish()


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_random_stories(soak, backend: str) -> None:
    Stories.soak, Stories.backend = soak, backend
    case = Stories.TestCase()
    case.settings = settings(
        max_examples=6 if backend == "torch" else 4,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=[Phase.generate],
    )
    case.runTest()
