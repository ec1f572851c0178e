"""Many characters on one backend: who has which slots, and one token for everyone a step (continuous batching)."""

import time
from dataclasses import replace

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.runtime.ahead import DeviceSteps
from kinetok.runtime.backends import Backend, DrawingBackend
from kinetok.runtime.character import Character, Job
from kinetok.runtime.steps import NO_NUMBERS, HostSteps, Steps

ENDED_AT_ONCE = 1  # the one token of a clip whose end token comes first, as in the reference


class Scheduler:
    """Characters join and leave between steps, in the order in which they came; each one's tokens depend on its job alone.

    Whatever an exception or Ctrl-C interrupts, wherever, can be repeated: a step only puts whole results in place, a cache
    that was cut off is filled again as it was, and which slots are free follows from the characters, so none can be lost.
    """

    def __init__(self, backend: Backend, config: DecoderConfig, queue: int) -> None:
        self.backend, self.config, self.queue = backend, config, queue
        self.characters: list[Character] = []  # in the order in which they came
        self._steps: Steps = DeviceSteps(backend) if isinstance(backend, DrawingBackend) else HostSteps(backend, config)

    @property
    def waiting(self) -> list[Character]:
        return [character for character in self.characters if character.state == "queued"]

    @property
    def running(self) -> list[Character]:
        return [character for character in self.characters if character.state == "running"]

    @property
    def free(self) -> list[int]:
        """Slots that nobody has."""
        taken = {slot for character in self.running for slot in character.slots}
        return [slot for slot in range(self.backend.slots) if slot not in taken]

    def check(self, job: Job) -> None:
        """Raise ``UserError`` for a job that this backend could never run."""
        rows, width = len(job.texts), self.config.text_dim
        for text in job.texts:
            if text.ndim != 2 or not len(text) or text.shape[1] != width:
                raise UserError(f"expected text features [L, {width}], L > 0, got {list(text.shape)}")
        # The last token is never fed back, so a clip that ends within the window takes a position less.
        positions = max(map(len, job.texts)) + (job.window if job.most > job.window else int(job.most) - 1)
        if rows > self.backend.slots:
            raise UserError(f"guidance needs {rows} slots a character, but there are {self.backend.slots}")
        if positions > self.backend.capacity:
            raise UserError(
                f"text and motion need {positions} positions, but a slot holds {self.backend.capacity}: ask for a shorter "
                "clip or prompt, or start with more positions"
            )

    def submit(self, job: Job) -> Character:
        """Put a job into the queue. Raises ``UserError`` when the queue is full or the job can never run."""
        self.check(job)
        if len(self.waiting) >= self.queue:
            raise UserError(f"the queue is full: {self.queue} characters wait already; submit again later")
        character = Character(job)
        self.characters.append(character)
        return character

    def cancel(self, character: Character) -> None:
        """End a character now; its slots are free at once. No effect on one that is over."""
        if not character.over:
            character.end("cancelled", None)

    def fail(self, character: Character, error: str) -> None:
        """End a character as "failed", even one whose tokens were all written."""
        character.end("failed", error)

    def fork(self, character: Character, job: Job) -> Character:
        """A second character with the same past (text, tokens, cache), which draws by ``job``'s params and request.

        Raises ``UserError`` where the first one is not running or no slots are free.
        """
        self.admit()
        if character.state == "running" and not character.tokens:
            self._steps.fill_one(character)
        if character.state != "running":
            raise UserError(f"expected a running character to fork, but this one is {character.state}")
        slots = self.free[: len(character.slots)]
        if len(slots) < len(character.slots):
            raise UserError(f"no free slots for a fork: {len(self.running)} characters run")
        for source, target in zip(character.slots, slots, strict=True):
            self.backend.copy(source, target)
        twin = replace(character, job=job, slots=slots, tokens=list(character.tokens), paused=False)
        self._steps.fork(twin)
        self.characters.append(twin)
        return twin

    def redirect(self, character: Character, job: Job, carry: int) -> None:
        """Go on with another job: its text and the last ``carry`` tokens are prefilled into the slots, the old text is gone;
        fewer tokens where a long text leaves no room for them.

        Raises ``UserError`` for a character that is over, and for a job that does not fit.
        """
        self.check(job)
        if character.over:
            raise UserError(f"expected a character that is under way, this one is {character.state}")
        if len(job.texts) != len(character.job.texts):
            raise UserError("guidance cannot be switched on or off while a character is under way")
        character.job, character.carry = job, max(1, min(carry, job.window))
        character.seen, character.ahead, character.noise = None, None, None

    def step(self, now: float | None = None) -> list[Character]:
        """One token for every running character that is not paused; returns those that got one or ended.

        Where many join at once, or slide, some of them get their token a few steps later
        (``kinetok.runtime.steps.PREFILLED_AT_ONCE``). A character whose logits are no numbers, or whose prefill the backend
        refuses, ends as "failed" and says why; the others go on. What the backend raises otherwise comes through, and the
        step can be repeated.
        """
        now = time.monotonic() if now is None else now
        ended = []
        for character in self.running:
            self._settle(character)  # what an exception left undone
        self.characters = [character for character in self.characters if not character.over]
        for character in self.characters:
            if character.job.deadline is not None and now >= character.job.deadline:
                character.end("expired", f"its deadline passed after {len(character.tokens)} tokens")
                ended.append(character)
        self.admit()
        active = [character for character in self.running if not character.paused]
        before = [len(character.tokens) for character in active]
        for character, token in self._steps.tokens(active):
            self._take(character, token)
        moved = [c for c, written in zip(active, before, strict=True) if c.over or len(c.tokens) > written]
        return ended + moved

    def admit(self) -> None:
        """Give slots to those who wait, as far as there are any; nobody overtakes."""
        free = self.free
        for character in self.waiting:
            rows = len(character.job.texts)
            if rows > len(free):
                return
            character.slots, free = free[:rows], free[rows:]
            character.state = "running"

    def _take(self, character: Character, token: int | None) -> None:
        if token is None:
            character.end("failed", f"at token {len(character.tokens)}: {NO_NUMBERS}")
        elif token == self.config.end_id:
            character.ended = True
        else:
            character.tokens.append(token)
        self._settle(character)

    def _settle(self, character: Character) -> None:
        if character.over:
            return
        if character.ended and not character.tokens:
            character.tokens.append(ENDED_AT_ONCE)
        if character.ended or len(character.tokens) >= character.job.most:
            character.end("done", None)
