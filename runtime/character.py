"""A character: what it is to do, and how far it is."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from kinetok.errors import UserError
from kinetok.runtime.backends import Reading
from kinetok.runtime.sampling import SamplingParams

HELD = 6  # tokens, or more of them, to a kind: standing still has three kinds among thirty, the slowest dance seven

State = Literal["queued", "running", "done", "cancelled", "expired", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """What a character is to do.

    text, empty: features ``[L, D]`` of the prompt and, with guidance, of the empty text. params without None
    (``SamplingParams.resolve``). least, most: tokens of the clip in all. request: with the seed, the name of the draws.
    window: most motion tokens in the cache; when they are that many, or show a held pose (``Character.slides``), the text
    and the last ``keep`` of them (``Character.kept``) are prefilled anew. deadline: ``time.monotonic()`` after which it is
    given up.
    Raises ``UserError`` for a request that is no number of 32 bits: found out in a step, it would end that of everyone.
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

    def __post_init__(self) -> None:
        if type(self.request) is not int or not 0 <= self.request < 1 << 32:
            raise UserError(f"request: expected a whole number from 0 to {(1 << 32) - 1}, got {self.request!r}")

    @property
    def texts(self) -> list[Tensor]:
        return [self.text] if self.empty is None else [self.text, self.empty]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The logits ``[rows, V]`` after ``written`` tokens, the last ``cached`` of which are behind the text in the cache."""

    written: int
    cached: int
    logits: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """What the device has drawn or is drawing: ``readings[i]`` will tell token number ``first + i`` of the clip.

    All tokens before the last of them are in the cache, or on their way there.
    """

    first: int
    readings: tuple[Reading, ...]

    @property
    def launched(self) -> int:
        """Tokens written and drawn."""
        return self.first + len(self.readings)


@dataclass(eq=False)
class Character:
    """A job under way. ``tokens`` grows by one a step while the state is "running" and ``paused`` is not set."""

    job: Job
    state: State = "queued"
    slots: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seen: Seen | None = None  # None also after a step that was cut off: what the cache holds is then unknown
    ahead: Ahead | None = None  # None also after a launch that was cut off
    base: tuple[int, int] | None = None  # from which token to which one was prefilled; the later ones were decoded
    carry: int | None = None  # the tokens to prefill behind a new text
    ended: bool = False  # drew the end token
    paused: bool = False
    error: str | None = None
    noise: tuple[int, Tensor] | None = None

    @property
    def over(self) -> bool:
        return self.state not in ("queued", "running")

    @property
    def kept(self) -> int:
        """The newest tokens to prefill behind the text: a new prompt's, or those of a window that is full.

        Of a held pose it is one: that says all of it, and behind more of them a model would rather hold on than
        do what the text says (docs/streaming.md). A pose is held where there are few kinds of tokens among many.
        """
        return self.carry or (1 if self._holds(len(self.tokens)) else self.job.keep)

    def slides(self, fed: int) -> bool:
        """Whether the cache, where the tokens from ``base`` to before number ``fed`` lie, is to be prefilled anew.

        It is where it is full, and in a clip of more than a window also where all that can be kept shows a held pose, which
        may otherwise go on until the window is full. A device draws one token ahead of what the host has read, so the
        newest token says nothing here.
        """
        assert self.base is not None
        cached, job = fed - self.base[0], self.job
        return cached >= job.window or (job.most > job.window and cached > 2 * job.keep and self._holds(fed))

    def _holds(self, end: int) -> bool:
        """Whether the last tokens before number ``end`` are a held pose."""
        recent = self.tokens[max(0, end - 2 * self.job.keep) : end]
        return HELD * len(set(recent)) <= len(recent)

    @property
    def ready(self) -> bool:
        """Whether the logits of its next token are known."""
        return self.seen is not None and self.seen.written == len(self.tokens)

    def end(self, state: State, error: str | None) -> None:
        """Give up the slots, and say why. No effect on what is written."""
        self.error, self.state = error, state
        self.slots, self.seen, self.ahead, self.noise = [], None, None, None
