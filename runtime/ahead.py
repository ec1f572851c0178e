"""Steps of a backend that draws on the device: the next one is launched before the host reads the one before."""

from collections.abc import Sequence

from kinetok.kernels.sampling import Draw
from kinetok.runtime.backends import DrawingBackend
from kinetok.runtime.character import Ahead, Character, Job
from kinetok.runtime.memory import memory_plan
from kinetok.runtime.steps import Steps

FOREVER = 1 << 62


class DeviceSteps(Steps):
    """``Steps`` on a ``DrawingBackend``, with the tokens of ``HostSteps``.

    While the host waits for a token, and while it then makes frames of it, the device works on the next one. A character
    that ends, is cancelled or gets a new text wastes that one step. Only where a window slides, full or with a held
    pose, does the device wait for the host, because the host has to know the tokens: once in seconds of motion.
    """

    backend: DrawingBackend

    def __init__(self, backend: DrawingBackend) -> None:
        super().__init__(backend)

    def tokens(self, characters: Sequence[Character]) -> list[tuple[Character, int | None]]:
        late: list[Character] = []
        due: list[Character] = []
        for character in characters:
            if not _unread(character):
                (late if _goes_on(character) else due).append(character)
        self.fill(due)
        for character in due:
            if character.ready:
                self._begin(character)
        self._launch(late)
        self._launch([c for c in characters if _unread(c) == 1 and _goes_on(c)])
        return [(c, _next(c)) for c in characters if _unread(c)]

    def fork(self, twin: Character) -> None:
        """The twin draws its next token itself: from the logits after a prefill, else by feeding its newest token again."""
        ahead, twin.ahead, twin.noise = twin.ahead, None, None
        if ahead is None or twin.ready:
            return
        assert twin.base is not None
        written, cached = len(twin.tokens), len(twin.tokens) - 1 - twin.base[0]
        if not twin.slides(written - 1):
            lengths = [len(text) + cached for text in twin.job.texts]
            self.backend.resume(twin.slots, lengths, draw_of(twin.job), written, twin.tokens[-1])
        twin.ahead = Ahead(written, ())

    def _begin(self, character: Character) -> None:
        """Draw from the logits after a prefill."""
        seen, job = character.seen, character.job
        assert seen is not None
        character.ahead = None
        lengths = [len(text) + seen.cached for text in job.texts]
        reading = self.backend.begin(character.slots, lengths, draw_of(job), seen.written, seen.logits)
        character.ahead = Ahead(seen.written, (reading,))

    def _launch(self, characters: Sequence[Character]) -> None:
        """One more token for all of these."""
        if not characters:
            return
        before: list[Ahead] = []
        for character in characters:
            assert character.ahead is not None
            before.append(character.ahead)
            if not character.ready:
                character.seen = None
            character.ahead = None
        with memory_plan(f"a step of {len(characters)} characters", self.backend.device):
            reading = self.backend.decode_and_draw([character.slots[0] for character in characters])
        for character, ahead in zip(characters, before, strict=True):
            written = len(character.tokens)
            character.ahead = Ahead(written, (*ahead.readings[written - ahead.first :], reading))


def draw_of(job: Job) -> Draw:
    """A job's draws, as the kernels know them."""
    params = job.params
    assert params.temperature is not None and params.top_k is not None
    assert params.top_p is not None and params.guidance is not None
    return Draw(
        seed=params.seed,
        request=job.request,
        least=int(min(job.least, FOREVER)),
        most=int(min(job.most, FOREVER)),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        guidance=params.guidance,
    )


def _unread(character: Character) -> int:
    """How many tokens were drawn and not read."""
    return character.ahead.launched - len(character.tokens) if character.ahead is not None else 0


def _goes_on(character: Character) -> bool:
    """Whether another token can be drawn from what the cache holds."""
    ahead = character.ahead
    if ahead is None or character.base is None:
        return False
    return ahead.launched < character.job.most and not character.slides(ahead.launched - 1)


def _next(character: Character) -> int | None:
    ahead = character.ahead
    assert ahead is not None
    return ahead.readings[len(character.tokens) - ahead.first].token(character.slots[0])
