"""Random joins, leaves, cancels, forks, new prompts and faults on a small crowd: ``python benchmarks/runtime/soak_crowd.py``.

After every event the slots must add up, and every clip that ends must have the tokens and the frames, to the bit, of the
same story told to a character alone. The rules are also those of tests/runtime/test_crowd_chaos.py.
"""

import argparse
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import ModelBundle
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime import Engine

PROMPTS = ["walk", "run fast", "wave with both hands", "sit", "jump up and down, again and again, without a rest"]
TEXT_DIM = 8


class WordEncoder:
    """Features of the small model: one random row a word, always the same."""

    dim, name = TEXT_DIM, "words"

    def encode(self, texts: list[str]) -> list[torch.Tensor]:
        return [torch.stack([self._row(word) for word in ("<s>", *text.split())]) for text in texts]

    def _row(self, word: str) -> torch.Tensor:
        seed = int.from_bytes(word.encode()[:7].ljust(7, b"."), "little")
        return 3 * torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def small_engine(*, causal: bool = True, device: str = "cpu", **limits: Any) -> Engine:
    """An engine on random weights: 15 tokens a second, 180 positions."""
    torch.manual_seed(5)
    tokenizer = TokenizerConfig(nb_code=256, code_dim=16, width=16, depth=2, patcher="none", causal=causal)
    decoder = DecoderConfig(
        n_layer=2, n_head=2, n_embd=32, codebook=240, text_dim=TEXT_DIM, block_size=180, tie_weights=False
    )
    model = MotionDecoder(decoder).eval()
    with torch.no_grad():
        model.head.weight *= 4  # far from uniform, so that a wrong cache changes the tokens
    bundle = ModelBundle(
        tokenizer=MotionTokenizer(tokenizer).eval().to(device),
        decoder=model.to(device),
        mean=np.zeros(272),
        std=np.full(272, 0.1),
        offsets=np.zeros((22, 3)),
        text_encoder={"type": "none", "name": "words"},
        sampling={"temperature": 1.0, "top_p": 0.9, "guidance": 1.0, "min_seconds": 0.2},
        provenance={},
        licence="none",
        bank=None,
        directory=Path("random"),
    )
    engine = Engine(bundle, **limits)
    engine.text = WordEncoder()  # type: ignore[assignment]
    return engine


@dataclass
class Story:
    """What a character was told: its parameters, and (tokens written, event, argument) since; frames that were read."""

    prompt: str
    params: dict[str, Any]
    events: list[tuple[int, str, Any]] = field(default_factory=list)
    skipped: int = 0  # frames before a fork
    frames: list[np.ndarray] = field(default_factory=list)


class Chaos:
    """A crowd, and the stories of everyone in it."""

    def __init__(
        self, seed: int, *, causal: bool = True, characters: int = 3, backend: str = "torch", device: str = "cpu"
    ) -> None:
        self.random = random.Random(seed)
        where = {"causal": causal, "backend": backend, "device": device}
        # Bits of frames are promised on a CPU, where each row is a product of its own.
        self.near = 0.0 if device == "cpu" else 1e-4
        self.engine = small_engine(characters=characters, queue=4, **where)
        self.crowd = self.engine._start()
        self.solo = small_engine(characters=2, queue=1, **where)
        self.stories: dict[int, Story] = {}
        self.counts: Counter[str] = Counter()
        self._break_decode()

    def _break_decode(self) -> None:
        """Make the backend and the detokenizer raise when told to."""
        self.broken: set[str] = set()
        backend = self.crowd.scheduler.backend
        step = "decode_and_draw" if hasattr(backend, "decode_and_draw") else "decode"
        for owner, method, name in (
            (backend, step, "decode"),
            (self.crowd.detokenizer.tokenizer, "unpatch", "unpatch"),
        ):
            setattr(owner, method, self._breakable(name, getattr(owner, method)))

    def _breakable(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            result = call(*args) if name == "unpatch" else None
            if name in self.broken:
                self.broken.discard(name)
                raise KeyboardInterrupt if self.random.random() < 0.5 else RuntimeError(f"{name} broke")
            return result if name == "unpatch" else call(*args)

        return wrapped

    def pick(self) -> int | None:
        return self.random.choice(list(self.stories)) if self.stories else None

    def submit(self) -> None:
        draw = self.random
        params: dict[str, Any] = {
            "seconds": draw.choice([None, 0.1, 0.7, 2.0, 14.0]),
            "seed": draw.randrange(3),
            "guidance": draw.choice([1.0, 2.5]),
            "temperature": draw.choice([0, 1.0]),
            "request": draw.randrange(2),
        }
        prompt = draw.choice(PROMPTS)
        try:
            handle = self.engine.submit(prompt, **params)
        except UserError as error:
            assert "full" in str(error) or "unread" in str(error), error
            self.counts["refused"] += 1
            return
        self.stories[handle] = Story(prompt, params)
        self.counts["submitted"] += 1

    def step(self) -> None:
        self.engine.step()
        self.counts["steps"] += 1

    def fault(self) -> None:
        self.broken.add(self.random.choice(["decode", "unpatch"]))
        before = {handle: self.crowd.written(handle) for handle in self.stories}
        try:
            self.engine.step()
        except (RuntimeError, KeyboardInterrupt):
            self.counts["faults"] += 1
        self.broken.clear()
        assert all(self.crowd.written(handle) - count in (0, 1) for handle, count in before.items())

    def poll(self) -> None:
        handle = self.pick()
        if handle is not None:
            self._read(handle)

    def _read(self, handle: int) -> None:
        story, written = self.stories[handle], list(self.crowd._get(handle).character.tokens)
        update = self.engine.poll(handle)
        if update.motion is not None:
            story.frames.append(update.motion.features)
        if update.over:
            assert update.state == "done", update
            del self.stories[handle]
            self.verify(story, written)

    def cancel(self) -> None:
        handle = self.pick()
        if handle is not None:
            self.engine.cancel(handle)
            del self.stories[handle]
            self.counts["cancelled"] += 1

    def fork(self) -> None:
        handle = self.pick()
        if handle is None:
            return
        request = self.random.randrange(5, 8)
        try:
            twin = self.engine.fork(handle, request=request)
        except UserError as error:
            assert "fork" in str(error) or "unread" in str(error), error
            return
        old, written = self.stories[handle], self.crowd.written(handle)
        self.stories[twin] = Story(
            old.prompt, old.params, [*old.events, (written, "fork", request)], self._frames_before(handle)
        )
        self.counts["forked"] += 1

    def _frames_before(self, handle: int) -> int:
        story = self.stories[handle]
        return story.skipped + sum(map(len, story.frames)) + self.crowd._get(handle).reading.waiting

    def redirect(self) -> None:
        handle = self.pick()
        if handle is None:
            return
        prompt, written = self.random.choice(PROMPTS), self.crowd.written(handle)
        try:
            self.engine.redirect(handle, prompt)
        except UserError as error:
            assert "under way" in str(error), error
            return
        self.stories[handle].events.append((written, "redirect", prompt))
        self.counts["redirected"] += 1

    def verify(self, story: Story, tokens: list[int]) -> None:
        """The same story alone must give the same tokens and frames, to the bit."""
        handle = self.solo.submit(story.prompt, **story.params)
        crowd = self.solo._start()
        frames, events, update = [], list(story.events), None
        while update is None or not update.over:
            while events and events[0][0] == crowd.written(handle):
                _, event, argument = events.pop(0)
                if event == "redirect":
                    self.solo.redirect(handle, argument)
                else:  # alone it goes on as its own twin
                    crowd.scheduler.admit()
                    twin = self.solo.fork(handle, request=argument)
                    self.solo.cancel(handle)
                    handle = twin
            self.solo.step()
            expected = list(crowd._get(handle).character.tokens)
            update = self.solo.poll(handle)
            if update.motion is not None:
                frames.append(update.motion.features)
        assert not events and expected == tokens, "another character's tokens"
        got, wanted = np.concatenate(story.frames or [np.empty((0, 272))]), np.concatenate(frames)[story.skipped :]
        assert got.shape == wanted.shape and np.allclose(got, wanted, rtol=0, atol=self.near), (
            "another character's frames"
        )
        self.counts["verified"] += 1

    def check(self) -> None:
        """No slot is lost or given twice, nobody is forgotten, and only what runs holds memory."""
        scheduler = self.crowd.scheduler
        taken = [slot for character in scheduler.running for slot in character.slots]
        assert len(taken) == len(set(taken)) and len(taken) + len(scheduler.free) == scheduler.backend.slots
        assert set(self.crowd._figures) == set(self.stories)
        live = {id(figure.character) for figure in self.crowd._figures.values()}
        assert {id(character) for character in (*scheduler.running, *scheduler.waiting)} <= live
        places = [f.place for f in self.crowd._figures.values() if f.place is not None and not f.closed]
        assert len(places) == len(set(places))

    def finish(self) -> None:
        """Let everyone end, and read everyone."""
        for _ in range(100_000):
            if not self.stories:
                return
            self.engine.step()
            for handle in list(self.stories):
                self._read(handle)
            self.check()
        raise AssertionError("somebody never ends")

    EVENTS = ("submit", "step", "fault", "poll", "cancel", "fork", "redirect")
    WEIGHTS = (8, 60, 3, 15, 2, 3, 3)

    def event(self) -> None:
        getattr(self, self.random.choices(self.EVENTS, self.WEIGHTS)[0])()
        self.check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="torch", help="torch, or fused: drawn on the device, read a step late")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chaos, began = Chaos(options.seed, backend=options.backend), time.process_time()
    memory: list[int] = []

    def report(done: int) -> None:
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        result = {
            "events": done,
            "of": options.events,
            "seed": options.seed,
            "backend": options.backend,
            "counts": dict(chaos.counts),
            "cpu_s": round(time.process_time() - began, 1),
            "peak_memory_mb_every_20th": memory,
            "torch": torch.__version__,
        }
        print(json.dumps(result), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    part = max(1, options.events // 20)
    for number in range(1, options.events + 1):
        chaos.event()
        if number % part == 0 and number < options.events:
            report(number)
    chaos.finish()
    assert not chaos.crowd.scheduler.running and len(chaos.crowd.scheduler.free) == chaos.crowd.scheduler.backend.slots
    report(options.events)


if __name__ == "__main__":
    main()
