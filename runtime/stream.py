"""``Stream``: one character's motion as it comes."""

from collections.abc import Callable, Iterator

from kinetok.errors import UserError
from kinetok.motion import Motion
from kinetok.runtime.character import Job
from kinetok.runtime.crowd import Crowd


class Stream(Iterator[Motion]):
    """Blocks of frames, each a ``Motion`` whose root and headings go on in the world of the clip's first frame.

    Iterating computes: one token, or as many as the tokenizer looks ahead, a block. ``close`` it, or use it in a ``with``:
    its memory, and what a backend prepares at its start, then serve the next stream (``release``).
    """

    def __init__(
        self,
        crowd: Crowd,
        release: Callable[[Crowd], None],
        job: Job,
        text: str,
        redirected: Callable[[str, int], Job],
        carry: int,
    ) -> None:
        self._crowd, self._release, self._redirected, self._carry = crowd, release, redirected, carry
        self._open: list[int] = []  # its handle, until it is over: whoever takes it out gives the crowd back, once
        try:
            self._open.append(crowd.submit(job, text))
        except UserError:
            release(crowd)
            raise

    @property
    def _handle(self) -> int | None:
        return next(iter(self._open), None)

    def __next__(self) -> Motion:
        while (handle := self._handle) is not None:
            try:
                self._crowd.step()
                update = self._crowd.poll(handle)
            except UserError:
                if self._handle is not None:
                    raise
                break  # closed meanwhile, by another thread or a signal handler
            if update.over:
                self._over(lambda _: None)
                if update.error is not None:
                    raise UserError(update.error)
            if update.motion is not None:
                return update.motion
        raise StopIteration

    def redirect(self, prompt: str) -> None:
        """Another prompt from the next token on; the pose goes on. Raises ``UserError`` when the stream is over."""
        handle = self._handle
        if handle is None:
            raise UserError("this stream is over: start another one")
        job = self._redirected(prompt, self._crowd.written(handle))
        self._crowd.redirect(handle, job, self._carry, prompt)

    def close(self) -> None:
        """Stop; nothing more comes. From any thread, from a signal handler, as often as one likes."""
        self._over(self._crowd.cancel)

    def _over(self, end: Callable[[int], None]) -> None:
        try:
            handle = self._open.pop()
        except IndexError:
            return
        end(handle)
        self._release(self._crowd)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
