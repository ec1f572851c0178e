"""From tokens to the next tokens: what a character needs is brought into its slots, and drawn on the host."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.sampling import draw, guide, gumbel
from kinetok.model.config import DecoderConfig
from kinetok.runtime.backends import Backend, DrawingBackend
from kinetok.runtime.backends.threads import threads_for
from kinetok.runtime.character import Character, Seen
from kinetok.runtime.memory import memory_plan

NOISE_AHEAD = 1 << 16  # numbers drawn at once: a small head's noise costs as much for one position as for fifty
PREFILLED_AT_ONCE = 256  # positions a step, of all that join or slide: about as much work as one step of a full crowd
NO_NUMBERS = "expected finite logits, got NaN, infinity or none at all; are the model's weights whole?"


class Steps(ABC):
    """What brings texts and tokens into the slots of a backend, and the next tokens out of them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._due: list[Character] = []  # those to be prefilled, the first to have come first

    @abstractmethod
    def tokens(self, characters: Sequence[Character]) -> list[tuple[Character, int | None]]:
        """The next token of each running character; None where its logits are no numbers.

        One that cannot be prefilled ends as "failed", and one whose turn to be prefilled has not come is left out. Nothing
        is written: the same call gives the same tokens again. What the backend raises otherwise comes through.
        """

    @abstractmethod
    def fork(self, twin: Character) -> None:
        """Take notice of a copy whose slots have been copied, with its own job."""

    def fill(self, wanted: Sequence[Character]) -> None:
        """Prefill, or fill again, as many of these as a step may, those first that have waited longest.

        A step prefills ``PREFILLED_AT_ONCE`` positions, one character at least, so that those who run need not wait
        for all of a crowd that joins at once.
        """
        those = set(map(id, wanted))
        known = set(map(id, self._due))
        self._due = [c for c in self._due if id(c) in those] + [c for c in wanted if id(c) not in known]
        room = PREFILLED_AT_ONCE
        turn: list[Character] = []
        for character in self._due:
            tokens = min(len(character.tokens), character.kept)
            room -= sum(len(text) + tokens for text in character.job.texts)
            if turn and room < 0:
                break
            turn.append(character)
        self._fill_all(turn)
        self._due = self._due[len(turn) :]

    def _fill_all(self, characters: Sequence[Character]) -> None:
        """Bring the logits of these up to their tokens, by a prefill."""
        new = []
        for character in characters:
            lost = character.seen is None and character.ahead is None and character.base is not None
            if character.ready:
                continue
            if lost and not character.carry:
                self._replay(character, *character.base)  # type: ignore[misc]
            else:
                written = len(character.tokens)
                new.append((character, max(0, written - character.kept), written))
        self._prefill(new)

    def fill_one(self, character: Character) -> None:
        """Bring a character's logits up to its tokens, whoever else waits."""
        self._fill_all([character])

    def _prefill(self, wanted: Sequence[tuple[Character, int, int]]) -> None:
        """Characters' texts and their tokens from one to before another, the newest, into their slots."""
        try:
            found = self._prefilled(wanted)
        except UserError as error:
            if len(wanted) > 1:  # whose fault is it?
                for one in wanted:
                    self._prefill([one])
            else:
                character, _, last = wanted[0]
                character.end("failed", f"at token {last}: {error}")
            return
        for (character, first, last), logits in zip(wanted, found, strict=True):
            character.base, character.carry = (first, last), None
            character.seen = Seen(last, last - first, logits)

    def _prefilled(self, wanted: Sequence[tuple[Character, int, int]]) -> list[Tensor]:
        rows = [
            (slot, text, character.tokens[first:last])
            for character, first, last in wanted
            for slot, text in zip(character.slots, character.job.texts, strict=True)
        ]
        if not rows:
            return []
        with memory_plan(f"a text of {max(len(text) for _, text, _ in rows)} positions", self.backend.device):
            if isinstance(self.backend, DrawingBackend):
                logits = self.backend.prefill_all(rows)
            else:
                logits = torch.stack([self.backend.prefill(*row) for row in rows])
        return list(logits.split([len(character.slots) for character, _, _ in wanted]))

    def _replay(self, character: Character, first: int, last: int) -> None:
        """Fill the slots as they were filled before, to the same bits: prefill to ``last``, then token by token."""
        (logits,), written = self._prefilled([(character, first, last)]), len(character.tokens)
        for token in character.tokens[last:]:
            row = torch.full((len(character.slots),), token, device=self.backend.device)
            logits = self.backend.decode(character.slots, row)
        character.seen = Seen(written, written - first, logits)


class HostSteps(Steps):
    """``Steps`` that look at the logits: one decode of all characters, then a draw."""

    def __init__(self, backend: Backend, config: DecoderConfig) -> None:
        super().__init__(backend)
        self.config = config

    def tokens(self, characters: Sequence[Character]) -> list[tuple[Character, int | None]]:
        with threads_for(self.backend):
            return self._tokens(characters)

    def _tokens(self, characters: Sequence[Character]) -> list[tuple[Character, int | None]]:
        late: list[Character] = []
        due: list[Character] = []
        for character in characters:
            if not character.ready:
                seen = character.seen
                (due if seen is None or character.slides(seen.written) else late).append(character)
        self.fill(due)
        self._decode(late)
        return self._draw([c for c in characters if c.ready])

    def fork(self, twin: Character) -> None:
        twin.noise = None

    def _decode(self, characters: Sequence[Character]) -> None:
        slots = [slot for character in characters for slot in character.slots]
        if not slots:
            return
        tokens = torch.tensor([c.tokens[-1] for c in characters for _ in c.slots], device=self.backend.device)
        before = [c.seen for c in characters]
        for character in characters:
            character.seen = None
        with memory_plan(f"a step of {len(slots)} rows", self.backend.device):
            logits = self.backend.decode(slots, tokens)
        for character, seen, rows in zip(
            characters, before, logits.split([len(c.slots) for c in characters]), strict=True
        ):
            assert seen is not None
            character.seen = Seen(len(character.tokens), seen.cached + 1, rows)

    @torch.inference_mode()
    def _draw(self, characters: Sequence[Character]) -> list[tuple[Character, int | None]]:
        drawn: list[tuple[Character, int | None]] = []
        groups: dict[tuple[float, int, float], list[tuple[Character, Tensor]]] = {}
        for character in characters:
            assert character.seen is not None
            params, scores = character.job.params, self._scores(character, character.seen.logits)
            assert params.temperature is not None and params.top_k is not None and params.top_p is not None
            if scores.max().isfinite():
                groups.setdefault((params.temperature, params.top_k, params.top_p), []).append((character, scores))
            else:
                drawn.append((character, None))
        for (temperature, top_k, top_p), members in groups.items():
            noise = torch.stack([self._noise(c) for c, _ in members]) if temperature else None
            scores = torch.stack([scores for _, scores in members])
            tokens = draw(scores, noise, temperature=temperature, top_k=top_k, top_p=top_p).tolist()
            drawn += [(character, token) for (character, _), token in zip(members, tokens, strict=True)]
        return drawn

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
