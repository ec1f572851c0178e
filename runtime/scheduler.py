"""Many characters on one backend: who has which slots, and one token for everyone a step (continuous batching)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.sampling import draw, guide, gumbel
from kinetok.model.config import DecoderConfig
from kinetok.runtime.backends import Backend
from kinetok.runtime.sampling import SamplingParams

NOISE_AHEAD = 1 << 16  # numbers drawn at once: a small head's noise costs as much for one position as for fifty
ENDED_AT_ONCE = 1  # the one token of a clip whose end token comes first, as in the reference

State = Literal["queued", "running", "done", "cancelled", "expired", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """What a character is to do.

    text, empty: features ``[L, D]`` of the prompt and, with guidance, of the empty text. params without None
    (``SamplingParams.resolve``). least, most: tokens of the clip in all. request: with the seed, the name of the draws.
    window: most motion tokens in the cache; when they are that many, the text and the last ``keep`` of them are prefilled
    anew. deadline: ``time.monotonic()`` after which it is given up.
    """

    text: Tensor
    empty: Tensor | None
    params: SamplingParams
    least: float
    most: float
    request: int = 0
    window: int
    keep: int
    deadline: float | None = None

    @property
    def texts(self) -> list[Tensor]:
        return [self.text] if self.empty is None else [self.text, self.empty]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The logits ``[rows, V]`` after ``written`` tokens, the last ``cached`` of which are behind the text in the cache."""

    written: int
    cached: int
    logits: Tensor


@dataclass(eq=False)
class Character:
    """A job under way. ``tokens`` grows by one a step while the state is "running" and ``paused`` is not set."""

    job: Job
    state: State = "queued"
    slots: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seen: Seen | None = None  # None also after a step that was cut off: what the cache holds is then unknown
    base: tuple[int, int] | None = None  # from which token to which one was prefilled; the later ones were decoded
    carry: int | None = None  # the tokens to prefill behind a new text
    ended: bool = False  # drew the end token
    paused: bool = False
    error: str | None = None
    noise: tuple[int, Tensor] | None = None

    @property
    def over(self) -> bool:
        return self.state not in ("queued", "running")


class Scheduler:
    """Characters join and leave between steps, in the order in which they came; each one's tokens depend on its job alone.

    Whatever an exception or Ctrl-C interrupts, wherever, can be repeated: a step only puts whole results in place, a cache
    that was cut off is filled again as it was, and which slots are free follows from the characters, so none can be lost.
    """

    def __init__(self, backend: Backend, config: DecoderConfig, queue: int) -> None:
        self.backend, self.config, self.queue = backend, config, queue
        self.characters: list[Character] = []  # in the order in which they came

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
        rows = len(job.texts)
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
            self._end(character, "cancelled", None)

    def fail(self, character: Character, error: str) -> None:
        """End a character as "failed", even one whose tokens were all written."""
        self._end(character, "failed", error)

    def fork(self, character: Character, job: Job) -> Character:
        """A second character with the same past (text, tokens, cache), which draws by ``job``'s params and request.

        Raises ``UserError`` where the first one is not running or no slots are free.
        """
        self.admit()
        if character.state == "running" and not character.tokens:
            self._advance([character])
        if character.state != "running":
            raise UserError(f"expected a running character to fork, but this one is {character.state}")
        slots = self.free[: len(character.slots)]
        if len(slots) < len(character.slots):
            raise UserError(f"no free slots for a fork: {len(self.running)} characters run")
        for source, target in zip(character.slots, slots, strict=True):
            self.backend.copy(source, target)
        twin = replace(character, job=job, slots=slots, tokens=list(character.tokens), paused=False, noise=None)
        self.characters.append(twin)
        return twin

    def redirect(self, character: Character, job: Job, carry: int) -> None:
        """Go on with another job: its text and the last ``carry`` tokens are prefilled into the slots, the old text is gone.

        Raises ``UserError`` for a character that is over, and for a job that does not fit.
        """
        self.check(job)
        if character.over:
            raise UserError(f"expected a character that is under way, this one is {character.state}")
        if len(job.texts) != len(character.job.texts):
            raise UserError("guidance cannot be switched on or off while a character is under way")
        character.job, character.seen, character.noise, character.carry = job, None, None, max(1, carry)

    def step(self, now: float | None = None) -> list[Character]:
        """One token for every running character that is not paused; returns those that got one or ended.

        A character whose logits are no numbers, or which cannot be prefilled, ends as "failed" and says why; the others go
        on. What the backend raises in decoding all of them comes through, and the step can be repeated.
        """
        now = time.monotonic() if now is None else now
        ended = []
        for character in self.running:
            self._settle(character)  # what an exception left undone
        self.characters = [character for character in self.characters if not character.over]
        for character in self.characters:
            if character.job.deadline is not None and now >= character.job.deadline:
                self._end(character, "expired", f"its deadline passed after {len(character.tokens)} tokens")
                ended.append(character)
        self.admit()
        active = [character for character in self.running if not character.paused]
        self._advance(active)
        ready = [c for c in active if c.state == "running"]
        self._draw(ready)
        return ended + active

    def admit(self) -> None:
        """Give slots to those who wait, as far as there are any; nobody overtakes."""
        free = self.free
        for character in self.waiting:
            rows = len(character.job.texts)
            if rows > len(free):
                return
            character.slots, free = free[:rows], free[rows:]
            character.state = "running"

    def _advance(self, characters: Sequence[Character]) -> None:
        """Bring everyone's logits up to the tokens written."""
        late: list[tuple[Character, Seen]] = []
        for character in characters:
            seen, written = character.seen, len(character.tokens)
            if seen is not None and seen.written == written:
                continue
            if seen is None and character.base is not None and not character.carry:
                self._replay(character, *character.base)
            elif seen is None or seen.cached >= character.job.window:
                self._prefill(character, max(0, written - (character.carry or character.job.keep)), written)
            else:
                late.append((character, seen))
        slots = [slot for character, _ in late for slot in character.slots]
        if not slots:
            return
        tokens = torch.tensor([c.tokens[-1] for c, _ in late for _ in c.slots], device=self.backend.device)
        for character, _ in late:
            character.seen = None
        logits = self.backend.decode(slots, tokens)
        for (character, seen), rows in zip(late, logits.split([len(c.slots) for c, _ in late]), strict=True):
            character.seen = Seen(len(character.tokens), seen.cached + 1, rows)

    def _prefill(self, character: Character, first: int, last: int) -> None:
        """The text and the tokens from ``first`` to ``last``, the newest, into the character's slots."""
        try:
            rows = self._prefilled(character, first, last)
        except Exception as error:
            self._end(character, "failed", f"at token {last}: {error}")
            return
        character.base, character.carry = (first, last), None
        character.seen = Seen(last, last - first, torch.stack(rows))

    def _prefilled(self, character: Character, first: int, last: int) -> list[Tensor]:
        tokens, texts = character.tokens[first:last], character.job.texts
        return [self.backend.prefill(slot, text, tokens) for slot, text in zip(character.slots, texts, strict=True)]

    def _replay(self, character: Character, first: int, last: int) -> None:
        """Fill the slots as they were filled before, to the same bits: prefill to ``last``, then token by token."""
        logits, written = torch.stack(self._prefilled(character, first, last)), len(character.tokens)
        for token in character.tokens[last:]:
            row = torch.full((len(character.slots),), token, device=self.backend.device)
            logits = self.backend.decode(character.slots, row)
        character.seen = Seen(written, written - first, logits)

    @torch.inference_mode()
    def _draw(self, characters: Sequence[Character]) -> None:
        groups: dict[tuple[float, int, float], list[tuple[Character, Tensor]]] = {}
        for character in characters:
            assert character.seen is not None
            params, scores = character.job.params, self._scores(character, character.seen.logits)
            assert params.temperature is not None and params.top_k is not None and params.top_p is not None
            best = scores.max()
            if not best.isfinite():
                problem = f"expected finite logits, got {best.item()} as the largest; are the model's weights whole?"
                self._end(character, "failed", f"at token {len(character.tokens)}: {problem}")
            else:
                groups.setdefault((params.temperature, params.top_k, params.top_p), []).append((character, scores))
        for (temperature, top_k, top_p), members in groups.items():
            noise = torch.stack([self._noise(c) for c, _ in members]) if temperature else None
            scores = torch.stack([scores for _, scores in members])
            tokens = draw(scores, noise, temperature=temperature, top_k=top_k, top_p=top_p).tolist()
            for (character, _), token in zip(members, tokens, strict=True):
                self._take(character, token)

    def _scores(self, character: Character, logits: Tensor) -> Tensor:
        guidance = character.job.params.guidance
        assert guidance is not None
        scores = guide(logits[0], logits[1], guidance) if len(logits) == 2 else logits[0].clone()
        if self.config.tie_weights:
            scores[self.config.pad_id] = -torch.inf
        if len(character.tokens) < character.job.least:
            scores[self.config.end_id] = -torch.inf
        return scores

    def _noise(self, character: Character) -> Tensor:
        """Gumbel noise ``[V]`` of the next position, from a stock of several positions."""
        position, classes = len(character.tokens), self.config.head_rows
        ahead = max(1, NOISE_AHEAD // classes)
        first = position - position % ahead
        if character.noise is None or character.noise[0] != first:
            seed, device = character.job.params.seed, self.backend.device
            most = int(min(first + ahead, max(character.job.most, position + 1)))
            positions = torch.arange(first, most, device=device)
            key = torch.tensor([seed - (seed >> 63 << 64)], device=device)
            character.noise = (
                first,
                gumbel(classes, key, positions, torch.tensor([character.job.request], device=device)),
            )
        return character.noise[1][position - first]

    def _take(self, character: Character, token: int) -> None:
        if token == self.config.end_id:
            character.ended = True
        else:
            character.tokens.append(token)
        self._settle(character)

    def _settle(self, character: Character) -> None:
        if character.ended and not character.tokens:
            character.tokens.append(ENDED_AT_ONCE)
        if character.ended or len(character.tokens) >= character.job.most:
            self._end(character, "done", None)

    def _end(self, character: Character, state: State, error: str | None) -> None:
        character.error, character.state = error, state
        character.slots, character.seen, character.noise = [], None, None
