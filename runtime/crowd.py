"""Characters under way, from their jobs to frames that somebody reads: the scheduler's tokens, detokenized as they come."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.config import FRAME_RATE
from kinetok.model.pretrained import ModelBundle
from kinetok.motion import Motion
from kinetok.runtime.backends import DrawingBackend, open_backend, open_detokenizer
from kinetok.runtime.character import Character, Job
from kinetok.runtime.memory import memory_plan
from kinetok.runtime.scheduler import Scheduler
from kinetok.runtime.standing import Standing

UNREAD_SECONDS = 20.0  # a character whose frames nobody reads stands still after so many; longer than any trained clip


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What is new of a character.

    motion: the frames since the last poll, in the world of the clip's first frame, None where there are none. state:
    "queued", "running", "paused" (nobody read its frames), and at the end "done", "expired" or "failed". error: why.
    """

    motion: Motion | None
    state: str
    error: str | None = None

    @property
    def over(self) -> bool:
        return self.state in ("done", "expired", "failed")


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """How far a character's frames were read, and where that left the figure; replaced as a whole."""

    read: int = 0
    unread: tuple[np.ndarray, ...] = ()
    at: Standing = field(default_factory=Standing)

    @property
    def waiting(self) -> int:
        return sum(map(len, self.unread))


@dataclass(eq=False)
class _Figure:
    character: Character
    text: str
    place: int | None = None  # in the detokenizer
    reading: _Reading = field(default_factory=_Reading)
    closed: bool = False


class Crowd:
    """``characters`` at once on one model, twice as many without guidance; all memory is taken here.

    positions: of text and motion a character may need, at most the model's ``block_size``. queue: how many may wait, and
    how many that are over may lie unread. warm: prepare every kind of step here too, where the backend knows how
    (``DrawingBackend.warm_up``). Calls may come from several threads, one is served at a time.
    Raises ``UserError`` where the memory is not there.
    """

    def __init__(
        self,
        model: ModelBundle,
        backend: str,
        characters: int,
        positions: int,
        queue: int,
        kv: str = "auto",
        *,
        warm: bool = True,
    ) -> None:
        slots = 2 * characters
        self.model = model
        device = model.tokenizer.decoder.last.weight.device
        with memory_plan(f"a crowd of {characters} characters with {positions} positions each", device):
            opened = open_backend(backend, model, slots, positions, kv)
            self.scheduler = Scheduler(opened, model.decoder.config, queue)
            self.detokenizer = open_detokenizer(backend, model.tokenizer, slots)
            if warm and isinstance(opened, DrawingBackend):
                opened.warm_up()
        # Frames are made beside the decoder's next step, which is under way by then.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._scale, self._shift = (torch.from_numpy(x).to(device, torch.float32) for x in (model.std, model.mean))
        self._limit = UNREAD_SECONDS * FRAME_RATE
        self._queue = queue
        self._figures: dict[int, _Figure] = {}
        self._next = 1
        self._lock, self._busy = threading.RLock(), False
        self._doomed: list[int] = []  # cancelled in the middle of a call of the same thread

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time, other threads wait. A signal handler would wait for its own thread for ever: it may only
        ``cancel``, which then counts from the end of the call that it came into."""
        if self._inside():
            raise UserError("this thread is in the middle of another call: a signal handler may only cancel")
        with self._lock:
            self._busy = True
            try:
                self._cancel_doomed()
                yield
                self._cancel_doomed()
            finally:
                self._busy = False

    def _inside(self) -> bool:
        """Whether a signal handler came into a call of its own thread. Ctrl-C may have left ``_busy`` set, the lock never."""
        return self._busy and self._lock._is_owned()  # type: ignore[attr-defined]

    def _cancel_doomed(self) -> None:
        while self._doomed:
            figure = self._figures.pop(self._doomed[-1], None)
            if figure is not None:
                self.scheduler.cancel(figure.character)
            self._doomed.pop()

    def submit(self, job: Job, text: str) -> int:
        """Put a character into the queue. Raises ``UserError`` when too many wait or lie unread, or it can never run."""
        with self._turn():
            self._check_unread()
            self._detokenize()  # what an exception left undone, before its place goes to somebody else
            figure = _Figure(self.scheduler.submit(job), text)
            self.scheduler.admit()
            return self._add(figure)

    def _check_unread(self) -> None:
        unread = sum(figure.character.over for figure in self._figures.values())
        if unread >= self._queue:
            raise UserError(f"{unread} characters are over and unread: poll or cancel some of them first")

    def _add(self, figure: _Figure) -> int:
        handle, self._next = self._next, self._next + 1
        self._figures[handle] = figure
        return handle

    def _get(self, handle: int) -> _Figure:
        try:
            return self._figures[handle]
        except (KeyError, TypeError):  # what cannot be a key either
            raise UserError(
                f"no character {handle!r}: it was cancelled or read to its end, or never submitted"
            ) from None

    def step(self) -> int:
        """One token for everyone who runs and is read; returns how many characters got one or ended (0: nothing to do)."""
        with self._turn():
            known = {id(figure.character) for figure in self._figures.values()}
            for character in self.scheduler.characters:
                if id(character) not in known:  # its submit was cut off before there was a handle
                    self.scheduler.cancel(character)
            self._detokenize()  # as in submit
            moved = self.scheduler.step()
            self._detokenize()
            return len(moved)

    def poll(self, handle: int) -> Update:
        """The frames since the last poll. A character that is over is forgotten once this has said so."""
        with self._turn():
            figure = self._get(handle)
            character = figure.character
            motion = self._block(figure) if figure.reading.unread else None
            character.paused = False
            if character.over and (figure.closed or character.state != "done"):
                del self._figures[handle]
                return Update(motion=motion, state=character.state, error=character.error)
            return Update(motion=motion, state="running" if character.over else character.state)

    def waiting(self, handle: int) -> str:
        """A character's state, without reading its frames."""
        with self._turn():
            character = self._get(handle).character
            return "paused" if character.paused else character.state

    def cancel(self, handle: int) -> None:
        """End a character and forget it, its unread frames too. A signal handler may call this in the middle of anything."""
        if self._inside():
            self._get(handle)
            self._doomed.append(handle)
            return
        with self._turn():
            figure = self._get(handle)
            self.scheduler.cancel(figure.character)
            del self._figures[handle]

    def fork(self, handle: int, job: Job) -> int:
        """A twin with the same past, which goes on by ``job``'s draws; its first frame is the one after the newest."""
        with self._turn():
            figure = self._get(handle)
            self._check_unread()
            self._detokenize()
            twin = _Figure(self.scheduler.fork(figure.character, job), figure.text)
            if figure.place is not None:
                place = self._free_place()
                with torch.cuda.stream(self._side):
                    self.detokenizer.copy(figure.place, place)
                twin.place = place
            seen = figure.reading
            at = seen.at.walk(np.concatenate(seen.unread))[2] if seen.unread else seen.at
            # The twin's frames start where the first one's newest frame is.
            twin.reading = _Reading(seen.read + seen.waiting, (), at)
            return self._add(twin)

    def redirect(self, handle: int, job: Job, carry: int, text: str) -> None:
        """Another prompt from the next token on, with the last ``carry`` tokens behind it; the pose goes on."""
        with self._turn():
            figure = self._get(handle)
            self.scheduler.redirect(figure.character, job, carry)
            figure.text = text

    def job(self, handle: int) -> Job:
        with self._turn():
            return self._get(handle).character.job

    def written(self, handle: int) -> int:
        """Tokens so far."""
        with self._turn():
            return len(self._get(handle).character.tokens)

    def _free_place(self) -> int:
        taken = {figure.place for figure in self._figures.values() if not figure.closed and not _lost(figure)}
        return next(place for place in range(self.detokenizer.slots) if place not in taken)

    def _detokenize(self) -> None:
        """Turn every token that is not yet detokenized into frames, one token a character at a time: the same pushes, and
        so the same bits, whatever was cut off before."""
        with torch.cuda.stream(self._side):
            self._push()

    def _push(self) -> None:
        figures = [f for f in self._figures.values() if not f.closed and not _lost(f) and f.character.tokens]
        self._collect(figures)  # what an exception kept from being collected
        while behind := [f for f in figures if not _lost(f) and self._pushed(f) < len(f.character.tokens)]:
            block = torch.tensor([[f.character.tokens[self._pushed(f)]] for f in behind])
            self.detokenizer.push([self._placed(f) for f in behind], block)
            self._collect(behind)
        done = [f for f in figures if f.character.state == "done"]
        self.detokenizer.finish([place for place in map(self._placed, done) if not self.detokenizer.clips[place].ended])
        self._collect(done)
        for figure in figures:
            if figure.character.state == "done":
                figure.closed = True
            if figure.reading.waiting > self._limit:
                figure.character.paused = True

    def _pushed(self, figure: _Figure) -> int:
        return self.detokenizer.clips[self._placed(figure)].pushed

    def _placed(self, figure: _Figure) -> int:
        """A figure's place in the detokenizer, taken when its first token comes."""
        if figure.place is None:
            place = self._free_place()
            self.detokenizer.reset(place)
            figure.place = place
        return figure.place

    def _collect(self, figures: Sequence[_Figure]) -> None:
        """Take over the frames that the detokenizer has made since it was last asked, in one copy for each number of them."""
        new: dict[int, list[tuple[_Figure, Tensor]]] = {}
        for figure in figures:
            clip, seen = self.detokenizer.clips[self._placed(figure)], figure.reading
            if clip.newest is not None and clip.made != seen.read + seen.waiting:
                new.setdefault(len(clip.newest), []).append((figure, clip.newest))
        for group in new.values():
            frames = torch.stack([newest for _, newest in group])
            blocks = torch.addcmul(self._shift, frames, self._scale).float().cpu().numpy()
            for (figure, _), features in zip(group, blocks, strict=True):
                if np.isfinite(features).all():
                    figure.reading = replace(figure.reading, unread=(*figure.reading.unread, features))
                else:
                    self.scheduler.fail(
                        figure.character, "the model decoded to NaN or infinity; are its weights whole?"
                    )

    def _block(self, figure: _Figure) -> Motion:
        seen = figure.reading
        features = np.concatenate(seen.unread)
        rotations, root, at = seen.at.walk(features)
        motion = Motion(rotations=rotations, root=root, offsets=self.model.offsets, text=figure.text)
        motion.features = features
        figure.reading = _Reading(seen.read + len(features), (), at)
        return motion


def _lost(figure: _Figure) -> bool:
    """Over before its end: no frames will come."""
    return figure.character.over and figure.character.state != "done"
