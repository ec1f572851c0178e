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
        self._handle: int | None = None
        try:
            self._handle = crowd.submit(job, text)
        except UserError:
            release(crowd)
            raise

    def __next__(self) -> Motion:
        while self._handle is not None:
            self._crowd.step()
            update = self._crowd.poll(self._handle)
            if update.over:
                self._over()
                if update.error is not None:
                    raise UserError(update.error)
            if update.motion is not None:
                return update.motion
        raise StopIteration

    def redirect(self, prompt: str) -> None:
        """Another prompt from the next token on; the pose goes on. Raises ``UserError`` when the stream is over."""
        if self._handle is None:
            raise UserError("this stream is over: start another one")
        job = self._redirected(prompt, self._crowd.written(self._handle))
        self._crowd.redirect(self._handle, job, self._carry, prompt)

    def close(self) -> None:
        """Stop; nothing more comes."""
        if self._handle is not None:
            self._crowd.cancel(self._handle)
            self._over()

    def _over(self) -> None:
        self._handle = None
        self._release(self._crowd)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
