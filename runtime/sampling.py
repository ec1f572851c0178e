"""What a caller can ask of a clip, and what a model answers where the caller is silent."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from kinetok.errors import UserError

TRAINED_SECONDS = 10.0
LONGEST_SECONDS = 600.0
KEPT_SECONDS = 1.0  # of motion that a clip longer than trained prefills anew; with more, a held pose may last for ever
CARRIED_SECONDS = (
    2 / 15
)  # of motion that a new prompt takes over; with more, the old motion goes on (docs/streaming.md)
FALLBACK: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.0}


def _number(name: str, value: Any, low: float, high: float, what: str) -> None:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if not (fine and low <= value <= high):  # written so that NaN is refused
        raise UserError(f"{name}: expected {what}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample; None leaves a value to the model's own default.

    seconds: the clip's length, up to 600, or infinity for a stream until it is stopped; models are trained on 10 s, and what
    is longer sees a window of its own last seconds. None lets the end token decide within 10 s. seed: 64 unsigned bits.
    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. guidance: classifier-free guidance scale, 1 is off.
    max_tokens: a cap on the tokens; 50 gives the reference's. Raises ``UserError`` naming the value that is wrong.
    """

    seconds: float | None = None
    seed: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and self.seconds != math.inf:
            what = f"0.001 to {LONGEST_SECONDS:g} seconds, or infinity for a stream"
            _number("seconds", self.seconds, 1e-3, LONGEST_SECONDS, what)
        if self.temperature is not None:
            _number("temperature", self.temperature, 0, 100, "a number from 0 (greedy) to 100")
        if self.temperature and self.temperature < 1e-3:
            raise UserError(f"temperature: expected 0 (greedy) or at least 0.001, got {self.temperature}")
        if self.top_p is not None:
            _number("top_p", self.top_p, 1e-4, 1, "a number from 0.0001 to 1 (1 is off)")
        if self.guidance is not None:
            _number("guidance", self.guidance, 0, 100, "a number from 0 to 100 (1 is off)")
        for name, low, high in (("seed", 0, 2**64 - 1), ("top_k", 0, 2**31), ("max_tokens", 1, 2**31)):
            value = getattr(self, name)
            given = value is not None or name == "seed"  # no model has a seed of its own
            if given and (type(value) is not int or not low <= value <= high):
                raise UserError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")

    def resolve(self, defaults: Mapping[str, Any]) -> Self:
        """The same with the model's ``defaults`` in place of None (seconds and max_tokens may stay None)."""
        known = {field.name for field in fields(self)}
        values = {**FALLBACK, **{k: v for k, v in defaults.items() if k in known}}
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})


def token_budget(
    params: SamplingParams, defaults: Mapping[str, Any], tokens_per_second: float, room: int
) -> tuple[float, float]:
    """Fewest and most tokens of a clip with ``room`` positions left after its text; whole numbers, or infinity twice.

    Explicit seconds fix both; otherwise the end token may come after the model's ``min_seconds``. Raises
    ``UserError`` when the text leaves too little room for what models are trained on.
    """
    if room < 1:
        raise UserError("the prompt fills the whole model; expected a shorter one")
    if params.seconds is not None:
        endless = params.seconds == math.inf
        count = math.inf if endless else max(1, round(params.seconds * tokens_per_second))
        if params.max_tokens is not None:
            count = min(count, params.max_tokens)
        if count > room and params.seconds <= TRAINED_SECONDS:
            raise UserError(
                f"seconds: {params.seconds:g} s are {count} tokens, but this prompt leaves room for {room} "
                f"({room / tokens_per_second:.1f} s); ask for less or shorten the prompt"
            )
        return count, count
    most = min(round(TRAINED_SECONDS * tokens_per_second), room, params.max_tokens or room)
    return min(most, round(float(defaults.get("min_seconds", 0.0)) * tokens_per_second)), most
